"""llama-eval: perplexity of a model over text, and how far its predictions are from those of another."""
