"""Weights that other tools have quantized: one module for each method."""
