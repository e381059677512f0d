"""Contracts of protos.containerd.types.runc.options and their generated stubs."""
