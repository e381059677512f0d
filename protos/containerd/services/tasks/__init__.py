"""Contracts of protos.containerd.services.tasks and their generated stubs."""
