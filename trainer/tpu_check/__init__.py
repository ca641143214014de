"""Whether a run's step compiles for a TPU, and how much of it it takes, without one."""
