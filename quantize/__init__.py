"""A checkpoint turned into one safetensors shard per TPU chip."""
