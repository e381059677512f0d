"""Contracts of protos.containerd.cgroups.v1 and their generated stubs."""
