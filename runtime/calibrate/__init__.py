"""A source's layers run one after the other over a text, to see what their linears are given."""
