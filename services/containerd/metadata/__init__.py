"""What containerd records in SQLite: the schema, and the rows of each noun. No other room has SQL."""
