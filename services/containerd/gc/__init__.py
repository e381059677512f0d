"""Garbage collection: what nothing refers to goes."""
