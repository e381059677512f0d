"""Contracts of protos.containerd.services.images.v1 and their generated stubs."""
