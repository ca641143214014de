"""Process-level services of a run: files, leases, signals, watchdog, progress."""
