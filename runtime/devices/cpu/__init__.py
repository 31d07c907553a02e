"""What lets a CPU decode at the speed of its memory."""
