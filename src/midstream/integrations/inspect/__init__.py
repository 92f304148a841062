"""midstream's sandbox as a sandbox of Inspect AI: ``sandbox="midstream"``.

It runs Python alone, without a container: what Inspect's ``python`` tool sends, scripts and modules, and a few commands
for files, each in the sample's own working directory. There is no shell and there are no other programs.
"""

from midstream.integrations.inspect.environment import MidstreamSandboxEnvironment, SandboxConfig

__all__ = ["MidstreamSandboxEnvironment", "SandboxConfig"]
