"""Images: names for manifests and indexes, and what turns those into file systems."""
