"""Contracts of protos.theseus.journal.v1 and their generated stubs."""
