"""Contracts of protos.containerd.services.containers and their generated stubs."""
