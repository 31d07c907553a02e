"""Loading shards onto the chips and decoding with fixed shapes."""
