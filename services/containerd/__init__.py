"""containerd: content, images, snapshots, containers, tasks, leases and the event journal of a node."""
