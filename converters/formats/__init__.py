"""File formats: safetensors, pickles, GGUF, compressed-tensors, Protocol Buffers."""
