"""Who computes an answer that no level remembers."""
