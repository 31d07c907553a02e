"""File formats that hold tensors: safetensors, pickles, GGUF, compressed-tensors."""
