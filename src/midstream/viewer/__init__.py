"""Trajectories for the eye: one HTML file that needs no server, no network and no installation."""

from midstream.viewer.page import write_page

__all__ = ["write_page"]
