"""Contracts of protos.containerd.types and their generated stubs."""
