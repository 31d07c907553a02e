"""Sources of LLaMA weights, brought to one layout: the Hugging Face directory."""
