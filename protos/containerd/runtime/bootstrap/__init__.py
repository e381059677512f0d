"""Contracts of protos.containerd.runtime.bootstrap and their generated stubs."""
