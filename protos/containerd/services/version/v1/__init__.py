"""Contracts of protos.containerd.services.version.v1 and their generated stubs."""
