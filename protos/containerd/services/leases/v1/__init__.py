"""Contracts of protos.containerd.services.leases.v1 and their generated stubs."""
