"""What a CPU runs at the speed of its memory."""
