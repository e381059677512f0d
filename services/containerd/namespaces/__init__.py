"""Namespaces: what keeps the clients of one containerd apart."""
