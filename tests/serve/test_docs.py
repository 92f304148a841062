"""The samples of docs/serve.md, against a service whose model says what they want."""

from __future__ import annotations

from typing import Any

from midstream import ScriptedEngine
from midstream.serve import ServiceLimits
from tests.docs.samples import ROOT, run_samples
from tests.serve.conftest import Serve

SAYS: list[tuple[Any, str]] = [
    ([{"role": "user", "content": "What is 6 * 7?"}], "It is <code>6 * 7</code>, so."),
    ("What is 6 * 7?", "It is <code>6 * 7</code>."),
    ("Set x.", "<code>x = 1</code> done"),
    ("Use x.", "Nothing to use."),
]


def test_the_samples_run(serve: Serve, tokenizer: Any) -> None:
    served = serve(SAYS)
    names: dict[str, Any] = {"__name__": "sample", "engine": ScriptedEngine(tokenizer, "x")}
    run_samples(ROOT / "docs" / "serve.md", names, {"http://localhost:8080": served.url})
    names["client"].close()
    assert names["app"].routes
    assert isinstance(names["limits"], ServiceLimits)
