"""Files read and written in little memory, whole or not at all, on whatever file system there is."""
