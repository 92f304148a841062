"""The drop-in over a policy that says scripts, and what came of it as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from midstream import SandboxPool, generate_with_code_and_tools
from midstream.decoding import decode
from tests.policies import ScriptedPolicy, input_batch
from tests.rollouts import VOCABULARY
from tests.spoken import spoken
from tests.vocabularies import tokenizer, vocabulary

EOS = min(vocabulary(VOCABULARY).eos_ids)


def ids_of(text: str) -> list[int]:
    return spoken(VOCABULARY, text)


def run(
    scripts: Mapping[str, Sequence[int]],
    pool: SandboxPool | None,
    *,
    kind: Any = dict,
    policy: Mapping[str, Any] | None = None,
    batch: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, ScriptedPolicy]:
    """What becomes of rows that say ``scripts``: prompts of several lengths, EOS as padding."""
    ending = {name: [*ids, EOS] for name, ids in scripts.items()}
    used = ScriptedPolicy(tokenizer(VOCABULARY), ending, kind, **(policy or {}))
    prompts = [ids_of(f"Q{'?' * index} {name}") for index, name in enumerate(scripts)]
    given = input_batch(kind, prompts, pad_id=EOS, name=list(scripts), **(batch or {}))
    return generate_with_code_and_tools(used, given, tokenizer(VOCABULARY), pool=pool, **options), used


def texts(output: Any, *, of: str = "all") -> list[str]:
    """What stands behind each prompt: everything, or just what is ``generated`` or ``injected``."""
    found = []
    rows = zip(output["output_ids"], output["generation_lengths"], output["unpadded_sequence_lengths"], strict=True)
    for index, (ids, new, total) in enumerate(rows):
        place = slice(int(total) - int(new), int(total))
        mask = output["token_mask"][index, place].tolist()
        kept = [
            i for i, own in zip(ids[place].tolist(), mask, strict=True) if of == "all" or own == (of == "generated")
        ]
        found.append(decode(vocabulary(VOCABULARY), kept))
    return found
