"""Contracts of protos.containerd.services.events and their generated stubs."""
