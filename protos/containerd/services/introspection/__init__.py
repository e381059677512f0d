"""Contracts of protos.containerd.services.introspection and their generated stubs."""
