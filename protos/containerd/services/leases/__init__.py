"""Contracts of protos.containerd.services.leases and their generated stubs."""
