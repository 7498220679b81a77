"""Side by side with the peers: the same work, the same machine, one run, and what each did with it."""
