"""Tokenizers and the other small files that go with a model's weights."""
