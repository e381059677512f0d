"""Contracts of protos.containerd.runtime.bootstrap.v1 and their generated stubs."""
