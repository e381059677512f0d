"""Contracts of protos.containerd.services.introspection.v1 and their generated stubs."""
