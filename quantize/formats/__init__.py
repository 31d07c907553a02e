"""The weight formats: one file for each."""
