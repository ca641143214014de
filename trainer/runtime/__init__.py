"""The process around a run: files, leases, signals, watchdog, progress."""
