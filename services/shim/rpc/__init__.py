"""What a shim serves, one module per gRPC service; protobuf stops here."""
