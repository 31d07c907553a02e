"""Linears for each weight format and device, which read a weight as it is stored."""
