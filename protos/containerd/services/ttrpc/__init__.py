"""Contracts of protos.containerd.services.ttrpc and their generated stubs."""
