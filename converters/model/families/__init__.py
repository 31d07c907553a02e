"""The families of models: one file for each."""
