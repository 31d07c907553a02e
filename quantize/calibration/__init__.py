"""What is known of the inputs of a model's linears, and how their weights are rounded by it."""
