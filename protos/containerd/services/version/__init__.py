"""Contracts of protos.containerd.services.version and their generated stubs."""
