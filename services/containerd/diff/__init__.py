"""Layers: reading a tar stream into a snapshot, and writing a snapshot's changes as one."""
