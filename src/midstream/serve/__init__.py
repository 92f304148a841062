"""An OpenAI-compatible server whose model runs code in the middle of its answers.

Needs starlette and uvicorn: ``pip install 'midstream[serve]'``.
"""

from __future__ import annotations

from midstream.serve.admission import ApiKeys, ServiceLimits
from midstream.serve.app import application
from midstream.serve.service import Service
from midstream.serve.traffic import Traffic

__all__ = ["ApiKeys", "Service", "ServiceLimits", "Traffic", "application"]
