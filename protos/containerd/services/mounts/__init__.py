"""Contracts of protos.containerd.services.mounts and their generated stubs."""
