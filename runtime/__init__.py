"""The shards loaded onto the chips and decoded with fixed shapes."""
