"""The layers that keep a session in: one file each. See :mod:`midstream.sandbox.inside.confinement` for their order."""
