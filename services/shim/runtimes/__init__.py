"""OCI runtimes: the interface, runc and crun behind it, and the only code that runs them."""
