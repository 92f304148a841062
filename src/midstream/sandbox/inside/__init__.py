"""What runs on the other side: the fork server and the interpreters it starts.

Nothing here is imported by the host. The fork server loads these modules (standard library only) through
``bootstrap``, under file names such as ``<sandbox worker>``: the host's paths are nobody's business in a
session, and frames of these files are easily left out of tracebacks.
"""
