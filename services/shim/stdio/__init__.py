"""Standard streams of a process: where they come from, where they go, who may attach."""
