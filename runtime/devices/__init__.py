"""The devices on which a decoder runs, behind one interface."""
