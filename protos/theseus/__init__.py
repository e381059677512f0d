"""Contracts of protos.theseus and their generated stubs."""
