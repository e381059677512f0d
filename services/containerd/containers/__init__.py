"""Container records: what a container is to be, and the metadata that clients keep with it."""
