"""Contracts of protos.theseus.engine and their generated stubs."""
