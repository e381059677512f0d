"""Networks of containers on this host: addresses, links, published ports.

Start at :mod:`services.daemon.networks.network`, the interface.
"""
