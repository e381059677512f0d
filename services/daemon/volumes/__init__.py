"""Volumes and bind mounts: what a container sees of the host's file systems.

Start at :mod:`services.daemon.volumes.store` and :mod:`services.daemon.volumes.mounts`.
"""
