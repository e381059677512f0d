"""Contracts of protos.containerd.services.diff.v1 and their generated stubs."""
