"""What the package does with no extra: sessions that compute, and rollouts over a tokenizer of bytes."""

from __future__ import annotations

import sys

import midstream as ms
from midstream.vocabulary import TokenizerSource


def search(query: str) -> list[str]:
    """Search."""
    return [query.upper()]


def main() -> None:
    with ms.SandboxPool() as pool, pool.session() as session:
        session.run("x = 3; y = 4")
        assert session.run("x + y").text == "7"
        bytes_only = TokenizerSource(
            size=257,
            piece=lambda token_id: bytes([token_id]) if token_id < 256 else b"<|end|>",
            encode_text=lambda text: list(text.encode()),
            encode_prompt=lambda text: list(text.encode()),
            added={"<|end|>": 256},
            eos_ids=frozenset([256]),
        )
        engine = ms.ScriptedEngine(bytes_only, "<code>a = 48213 * 977\na</code> and <code>search('b'), a + 1</code>.")
        with ms.Generator(engine, pool=pool, tools=[search]) as generator:
            batch = generator.generate(["What is it?"], n=2, reward=lambda row: float("47104101" in row.text))
    assert [row.reward for row in batch] == [1.0, 1.0]
    assert "(['B'], 47104102)" in batch[0].text
    batch.save("rollouts.jsonl")
    heavy = {"torch", "transformers", "numpy", "sympy", "ray", "vllm", "mcp", "bm25s", "pyarrow"} & set(sys.modules)
    assert not heavy, heavy


if __name__ == "__main__":
    main()
