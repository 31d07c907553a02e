"""Weights in Hugging Face's layout: a directory of safetensors or .bin files."""
