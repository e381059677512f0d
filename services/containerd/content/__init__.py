"""Content: blobs named by their digest, and the writes under way."""
