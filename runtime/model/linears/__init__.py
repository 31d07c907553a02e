"""Linears by weight format and device: what reads a weight as it is stored."""
