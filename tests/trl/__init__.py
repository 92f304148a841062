"""Real ``GRPOTrainer`` on the CPU, with the package's own small model. ``make test-trl``; skipped without TRL."""
