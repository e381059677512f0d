"""Contracts of protos.containerd.services.content and their generated stubs."""
