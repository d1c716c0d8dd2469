"""Models that turn texts into vectors, on this machine's CPU: one file per model."""
