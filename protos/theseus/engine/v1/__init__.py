"""Contracts of protos.theseus.engine.v1 and their generated stubs."""
