"""The toolbox that every service stands on: errors, gRPC plumbing, logs, metrics, Linux, SQLite.

A thing enters here when two services need it, not before.
"""
