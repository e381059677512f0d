"""Contracts of protos.containerd.services.ttrpc.events and their generated stubs."""
