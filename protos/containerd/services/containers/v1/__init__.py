"""Contracts of protos.containerd.services.containers.v1 and their generated stubs."""
