"""Contracts of protos.containerd.services.transfer.v1 and their generated stubs."""
