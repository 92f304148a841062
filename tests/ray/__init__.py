"""Real Ray clusters of several nodes on this machine. ``make test-ray``; skipped without Ray."""
