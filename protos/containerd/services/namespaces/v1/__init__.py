"""Contracts of protos.containerd.services.namespaces.v1 and their generated stubs."""
