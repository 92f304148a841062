"""Comparable things, each driven in a process of its own by an environment of its own."""
