"""Contracts of protos.theseus.tasks.v1 and their generated stubs."""
