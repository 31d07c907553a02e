"""What fits where and how fast it will be, without a TPU."""
