"""Contracts of protos.containerd.runtime.sandbox and their generated stubs."""
