"""The parts of a decoder: a module for each kind, in one table by kind."""
