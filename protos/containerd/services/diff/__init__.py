"""Contracts of protos.containerd.services.diff and their generated stubs."""
