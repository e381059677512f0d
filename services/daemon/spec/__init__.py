"""OCI runtime configurations: from what a user asked for to the ``config.json`` of one container.

Start at :mod:`services.daemon.spec.builder`.
"""
