"""Transfers: images from registries and archives into the stores, and back."""
