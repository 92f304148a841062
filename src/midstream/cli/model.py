"""The model of a run: first its tokenizer and configuration, which are cheap, then its weights."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midstream.engines.model_facts import context_bound
from midstream.errors import ConfigurationError
from midstream.vocabulary import Vocabulary

if TYPE_CHECKING:
    from midstream.engines.huggingface import HuggingFaceEngine


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model whose weights are not loaded. ``path``: a folder's absolute path, or a name on the hub."""

    path: str
    tokenizer: Any
    config: Any
    dtype: str
    device: str | None

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer)

    @property
    def context_length(self) -> int | None:
        """The most ids that a row may hold, as the engine will see it."""
        return context_bound(self, None)

    @property
    def versions(self) -> dict[str, str]:
        """Of what computes: for records."""
        return {name: version(name) for name in ("torch", "transformers") if importlib.util.find_spec(name)}


def open_model(model: str, dtype: str, device: str | None, *, weights: bool = True) -> ModelFiles:
    """The tokenizer and the configuration. Raises :class:`~midstream.errors.ConfigurationError`.

    ``weights``: whether the model is to be loaded later, which takes more to be installed.
    """
    for name in ("torch", "transformers") if weights else ("transformers",):
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(f"--model needs {name}: pip install 'midstream[hf]'")
    path = _path(model)
    _check_device(device)
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        # Broken files raise whatever their parsers do (OSError, ValueError, KeyError, a Rust panic's Exception).
        raise ConfigurationError(f"--model {model}: cannot be loaded: {type(error).__name__}: {error}") from error
    Vocabulary.of(tokenizer)
    return ModelFiles(path, tokenizer, config, dtype, device)


def load_engine(files: ModelFiles, batch_size: int) -> HuggingFaceEngine:
    """The engine, weights and all."""
    from midstream.engines.huggingface import HuggingFaceEngine

    return HuggingFaceEngine.from_pretrained(
        files.path, device=files.device, dtype=files.dtype, max_batch_size=batch_size
    )


def load_model(files: ModelFiles) -> Any:
    """The weights alone, on the device that was asked for, by default CUDA where there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    device = files.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(files.path, dtype=files.dtype)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--model {files.path}: no causal language model can be loaded: {error}") from error
    return model.to(device)


def _path(model: str) -> str:
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(f"--model {model}: the folder holds no config.json; it must be a model's")
        return str(folder.resolve())
    if folder.exists():
        raise ConfigurationError(f"--model {model}: is a file; it must be the folder of a model")
    if model.startswith((".", "~", os.sep)) or model.count("/") != 1 or model.endswith("/"):
        raise ConfigurationError(f"--model {model}: there is no such folder")
    return model


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigurationError(f"--device {device}: no such kind of device") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"--device {device}: there is no CUDA device here")
