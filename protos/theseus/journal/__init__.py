"""Contracts of protos.theseus.journal and their generated stubs."""
