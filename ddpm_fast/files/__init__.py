"""Files: the one writer, folders that a call continues, and pictures."""
