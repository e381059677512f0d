"""Developer scripts, run from a checkout and never packaged."""
