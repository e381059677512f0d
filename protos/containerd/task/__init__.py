"""Contracts of protos.containerd.task and their generated stubs."""
