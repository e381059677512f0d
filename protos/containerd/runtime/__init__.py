"""Contracts of protos.containerd.runtime and their generated stubs."""
