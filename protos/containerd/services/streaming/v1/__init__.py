"""Contracts of protos.containerd.services.streaming.v1 and their generated stubs."""
