"""Contracts of protos.containerd.services and their generated stubs."""
