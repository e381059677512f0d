"""Contracts of protos.containerd.cgroups and their generated stubs."""
