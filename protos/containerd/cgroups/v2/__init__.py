"""Contracts of protos.containerd.cgroups.v2 and their generated stubs."""
