"""Adapters to containerd: they implement the domain's interfaces, and protobuf stops here."""
