"""The decoder, independent of any device."""
