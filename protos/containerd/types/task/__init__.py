"""Contracts of protos.containerd.types.task and their generated stubs."""
