"""Contracts of protos.containerd.services.sandbox and their generated stubs."""
