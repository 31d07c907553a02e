"""One run of a model: loading, prompts, generation, measurements."""
