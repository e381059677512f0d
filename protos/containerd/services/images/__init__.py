"""Contracts of protos.containerd.services.images and their generated stubs."""
