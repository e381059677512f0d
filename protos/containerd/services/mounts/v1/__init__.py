"""Contracts of protos.containerd.services.mounts.v1 and their generated stubs."""
