"""The devices that a decoder runs on, behind one interface."""
