"""Whether what is recorded is there, and is what it should be; and the repair of what is not."""
