"""A process and its neighbours: ranks, agreement, signals, the lock and status of a run, watching, exit codes."""
