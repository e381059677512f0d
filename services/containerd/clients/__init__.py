"""The services that containerd calls: the shims."""
