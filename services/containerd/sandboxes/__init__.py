"""Sandboxes: their records, and the controller that has shims hold them."""
