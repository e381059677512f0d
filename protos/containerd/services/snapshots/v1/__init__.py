"""Contracts of protos.containerd.services.snapshots.v1 and their generated stubs."""
