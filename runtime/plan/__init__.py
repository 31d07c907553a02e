"""Which slices hold a model and how fast it will run there, without a TPU."""
