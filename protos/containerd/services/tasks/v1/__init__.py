"""Contracts of protos.containerd.services.tasks.v1 and their generated stubs."""
