"""Contracts of protos.containerd.types.runtimeoptions and their generated stubs."""
