"""What containerd records in SQLite: the schema, and the rows of each noun. SQL is nowhere else."""
