"""Tasks of the demo's held-out problems: their texts as lm_eval reads them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.docs.samples import ROOT, fences

PROBLEMS = 16


def write_tasks(folder: Path) -> None:
    """The task that docs/serve.md shows, and two that score texts, with their problems."""
    lines = (ROOT / "examples" / "calculator" / "held_out.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    chosen = problems[:: len(problems) // PROBLEMS]
    found = [{"question": p["question"], "answer": p["answer"], "wrong": f"{p['answer']}0"} for p in chosen]
    (folder / "problems.json").write_text(json.dumps(found))
    (shown,) = (text for kind, text in fences(ROOT / "docs" / "serve.md") if kind == "yaml")
    shown = shown.replace("problems.json", str(folder / "problems.json"))
    (folder / "calculator.yaml").write_text(shown)
    data = shown[shown.index("dataset_path") : shown.index("output_type")]
    (folder / "choice.yaml").write_text(CHOICE.replace("DATA", data))
    (folder / "perplexity.yaml").write_text(PERPLEXITY.replace("DATA", data))


CHOICE = r"""
task: choice
DATA
output_type: multiple_choice
doc_to_text: "Q: {{question}}\nA: The answer is"
doc_to_choice: "{{[wrong, answer]}}"
doc_to_target: 1
metric_list: [{metric: acc}]
"""

PERPLEXITY = r"""
task: perplexity
DATA
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "Q: {{question}}\nA: The answer is {{answer}}."
metric_list: [{metric: word_perplexity}]
"""
