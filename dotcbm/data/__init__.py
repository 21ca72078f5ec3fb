"""Pictures and their concepts, one source a file."""
