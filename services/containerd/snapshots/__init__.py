"""Snapshots: file trees that are prepared, filled, committed and built upon."""
