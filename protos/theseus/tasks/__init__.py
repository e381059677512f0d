"""Contracts of protos.theseus.tasks and their generated stubs."""
