"""Contracts of protos.theseus.shim.v1 and their generated stubs."""
