"""Containers as users see them: records, their life cycle, logs, attach and exec.

Start at :mod:`services.daemon.containers.record` (the data) and
:mod:`services.daemon.containers.runtime` (what this package needs from containerd).
"""
