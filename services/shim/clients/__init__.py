"""The services that a shim calls: the registry of containerd."""
