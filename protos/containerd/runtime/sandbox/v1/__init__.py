"""Contracts of protos.containerd.runtime.sandbox.v1 and their generated stubs."""
