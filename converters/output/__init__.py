"""Output directories: checked before the first byte, claimed, recorded and resumed."""
