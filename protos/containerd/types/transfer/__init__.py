"""Contracts of protos.containerd.types.transfer and their generated stubs."""
