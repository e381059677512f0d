"""Events: the journal that has every one of them in order, and the readers that follow it."""
