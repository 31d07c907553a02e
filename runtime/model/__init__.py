"""The decoder, which knows no device."""
