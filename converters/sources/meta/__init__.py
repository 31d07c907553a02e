"""Weights in Meta's own layout: consolidated.00.pth and on."""
