"""Contracts of protos.containerd.events and their generated stubs."""
