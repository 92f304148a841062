"""Measurements. ``python -m benchmarks`` runs all of them, ``python -m benchmarks.NAME`` one.

Each is a module with a ``main`` that prints a table and, given ``--json FILE``, writes its numbers there.
"""
