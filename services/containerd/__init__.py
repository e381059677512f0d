"""containerd: images, snapshots, containers, tasks, leases and the journal of a node."""
