"""Contracts of protos.containerd.services.snapshots and their generated stubs."""
