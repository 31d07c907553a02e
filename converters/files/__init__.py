"""Reading and writing files: in little memory, whole or not at all, on any file system."""
