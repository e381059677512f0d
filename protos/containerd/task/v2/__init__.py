"""Contracts of protos.containerd.task.v2 and their generated stubs."""
