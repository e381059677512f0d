"""Contracts of protos.containerd.services.transfer and their generated stubs."""
