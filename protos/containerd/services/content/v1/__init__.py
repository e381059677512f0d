"""Contracts of protos.containerd.services.content.v1 and their generated stubs."""
