"""Layouts of other tools that a model is written in."""
