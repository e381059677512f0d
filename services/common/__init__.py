"""The toolbox that every service stands on: errors, gRPC plumbing, logs, metrics, Linux, SQLite.

A thing enters here when two services need it, not before.
"""

VERSION = "0.1.0"
"""Version of the distribution; every tier and every shim says which one it runs."""
