"""llama-bench: the points to measure, their runs, and the report."""
