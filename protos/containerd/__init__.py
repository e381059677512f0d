"""Contracts of protos.containerd and their generated stubs."""
