"""One safetensors file per chip: how tensors are split, described, read and put together again."""
