"""Contracts of protos.containerd.services.ttrpc.events.v1 and their generated stubs."""
