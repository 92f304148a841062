"""NeMo-RL's environments: against small stand-ins of its interfaces, and, where it is there, against itself.

``make test-nemo-rl CHECKOUT=path`` runs the second kind; elsewhere they are skipped.
"""
