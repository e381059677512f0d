"""The gRPC services of containerd: unwrap, call the domain, wrap."""
