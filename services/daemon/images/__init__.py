"""Images as users name them. Start at :mod:`services.daemon.images.store`."""
