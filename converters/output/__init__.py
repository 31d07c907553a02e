"""An output directory: claimed, recorded, resumed, checked before the first byte."""
