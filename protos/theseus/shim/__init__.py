"""Contracts of protos.theseus.shim and their generated stubs."""
