"""Contracts of protos.containerd.types.runc and their generated stubs."""
