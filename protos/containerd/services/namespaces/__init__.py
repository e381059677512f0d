"""Contracts of protos.containerd.services.namespaces and their generated stubs."""
