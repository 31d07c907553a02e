"""llama-bench: what is measured, in turns, and the report."""
