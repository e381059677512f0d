"""Contracts of protos.containerd.types.runtimeoptions.v1 and their generated stubs."""
