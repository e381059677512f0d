"""Contracts of protos.containerd.services.events.v1 and their generated stubs."""
