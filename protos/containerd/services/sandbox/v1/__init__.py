"""Contracts of protos.containerd.services.sandbox.v1 and their generated stubs."""
