"""Contracts of protos.containerd.task.v3 and their generated stubs."""
