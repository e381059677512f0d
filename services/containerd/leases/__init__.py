"""Leases: what keeps work in progress from the collector."""
