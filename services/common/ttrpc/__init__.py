"""ttrpc, containerd's light protocol for shims: frames, a client, a server. No gRPC is imported."""
