"""Where weights come from: Hugging Face, Meta, GGUF, a random seed."""
