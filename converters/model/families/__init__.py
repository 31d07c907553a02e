"""Families of models: a file for each, the table of all, and what derives from it: config.json and the presets."""
