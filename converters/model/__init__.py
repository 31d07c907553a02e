"""What a model is: its architecture, its dimensions and its parameters."""
