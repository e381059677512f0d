"""Remotes: registries, from which images are pulled and to which they are pushed."""
