"""Contracts of protos.containerd.ttrpc and their generated stubs."""
