"""Contracts of protos.containerd.services.streaming and their generated stubs."""
