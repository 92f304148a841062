"""One vLLM for all tests, on the package's own small model. Without vLLM they are skipped: `make test-vllm`."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
MODEL = TESTS.parent / "src" / "midstream" / "demo"
sys.path += [str(TESTS / "engines"), str(TESTS.parent / "examples" / "calculator")]

# What `make test-vllm` sets; here too, so that these tests may be started in other ways.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

VLLM_OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "block_size": 32}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == TESTS / "vllm":  # vLLM leaves its messaging library's to the collector
            item.add_marker(pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning"))
    # A vLLM that ends takes with it what all that run in its process share, so those of single tests come last.
    items.sort(key=lambda item: item.path.name == "test_small_cache.py")


@pytest.fixture(scope="session")
def llm() -> Any:
    """A ``vllm.LLM`` with midstream's logits processor, in this process."""
    pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs it apart")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        from vllm import LLM, SamplingParams

        from midstream.engines.vllm.processor_v1 import RowProcessor

        started = LLM(str(MODEL), logits_processors=[RowProcessor], disable_log_stats=True, **VLLM_OPTIONS)
        started.generate({"prompt_token_ids": [5]}, SamplingParams(max_tokens=2), use_tqdm=False)
    yield started
    started.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def async_llm() -> Iterator[Any]:
    """An ``AsyncLLM``, whose core is a process of its own, as ``from_pretrained`` starts it."""
    pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs it apart")
    from midstream.engines.vllm import VLLMEngine

    before = children()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        started = VLLMEngine.from_pretrained(str(MODEL), mode="streaming", **VLLM_OPTIONS)
    assert children() - before  # of others that were there, such as sandboxes, some may have ended
    yield started.llm
    started.shutdown()
    started.shutdown()
    assert children() <= before
    assert not [thread for thread in threading.enumerate() if thread.name == "midstream-vllm"]


def children() -> set[int]:
    """The processes that this one has started and that run, helpers of Python's multiprocessing aside."""
    import psutil

    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile, or not waited for yet
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


@pytest.fixture(params=["resubmission", "streaming", "forced"])
def make_engine(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes engines of one way over one vLLM; afterwards, none of their requests is left in it."""
    llm = request.getfixturevalue("async_llm" if request.param == "streaming" else "llm")
    from midstream.engines.vllm import VLLMEngine

    made = []

    def make(**options: Any) -> VLLMEngine:
        engine = VLLMEngine(llm, mode=request.param, **options)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.shutdown()
    assert all(engine.unfinished == 0 for engine in made)


@pytest.fixture
def mode(make_engine: Callable[..., Any], request: pytest.FixtureRequest) -> str:
    """The way of the engines that ``make_engine`` makes."""
    return str(request.node.callspec.params["make_engine"])


@pytest.fixture
def engine(make_engine: Callable[..., Any]) -> Any:
    return make_engine()


@pytest.fixture(scope="session")
def model() -> Any:
    """The same model under transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def random_ids(count: int, seed: int) -> tuple[int, ...]:
    """Ordinary ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 448, (count,), generator=generator).tolist())


def sample(engine: Any, handles: list[int], count: int) -> list[tuple[list[int], list[float]]]:
    """``count`` new ids for each of the rows, and their logprobs. The rows are held then."""
    found: dict[int, tuple[list[int], list[float]]] = {handle: ([], []) for handle in handles}
    for _ in range(5000):
        if all(len(ids) >= count for ids, _ in found.values()):
            return [(ids[:count], logprobs[:count]) for ids, logprobs in found.values()]
        for update in engine.step():
            assert update.error is None
            ids, logprobs = found[update.handle]
            ids += update.ids
            logprobs += update.logprobs
            if len(ids) >= count:
                engine.rollback(update.handle, len(ids) - count)
    raise AssertionError(f"no {count} ids in 5000 steps")
