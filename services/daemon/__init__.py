"""``theseus-daemon``: containers, images, networks and volumes as users see them.

Start reading at :mod:`services.daemon.app`. The tier below, containerd, is behind
:mod:`services.daemon.clients`.
"""
