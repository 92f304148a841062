"""A run over a server: its options, and the engine in place of weights that are loaded here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace

from midstream.cli.model import ModelFiles
from midstream.engines.model_facts import end_of_sequence_ids
from midstream.engines.server import ServerConnection, ServerEngine
from midstream.engines.server.client import base_url
from midstream.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Served:
    """A server as the command line names it. ``key_name``: the environment variable that holds its key."""

    url: str
    model: str | None
    text_only: bool
    key_name: str | None

    @property
    def settings(self) -> dict[str, object]:
        """What records of this run have in common. The address may change from one start to the next."""
        return {"server": "given", "served_model": self.model, "text_only": self.text_only}

    def connect(self, files: ModelFiles, most_requests: int, give_up_after: float = 600.0) -> ServerEngine:
        """The engine over the server, which serves the model of ``files``. ``give_up_after``: seconds without an id."""
        return ServerEngine(
            self.url,
            files.tokenizer,
            model=self.model,
            text_only=self.text_only,
            context_length=files.context_length,
            eos_ids=_eos_ids(files),
            connection=ServerConnection(
                api_key=None if self.key_name is None else os.environ[self.key_name],
                max_requests=most_requests,
                give_up_after=give_up_after,
            ),
        )


def served_of(
    server: str | None,
    served_model: str | None,
    text_only: bool,
    api_key_env: str | None,
    *,
    dtype: str,
    device: str | None,
) -> Served | None:
    """What the options say. Raises :class:`~midstream.errors.ConfigurationError` for those that do not go together."""
    if server is None:
        given = {"--served-model": served_model, "--text-only": text_only, "--api-key-env": api_key_env}
        for option, value in given.items():
            if value:
                raise ConfigurationError(f"{option}: is of a server; give its --server too")
        return None
    for option, chosen in (("--dtype", dtype != "auto"), ("--device", device is not None)):
        if chosen:
            raise ConfigurationError(f"{option}: is the server's to choose; leave it out with --server")
    if api_key_env is not None and not os.environ.get(api_key_env):
        raise ConfigurationError(f"--api-key-env {api_key_env}: no such environment variable is set")
    try:
        url = base_url(server)
    except ConfigurationError as error:
        raise ConfigurationError(f"--server: {error}") from error
    return Served(url, served_model, text_only, api_key_env)


def _eos_ids(files: ModelFiles) -> frozenset[int]:
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(files.path)
    except OSError:  # a model need not have one
        generation = None
    return end_of_sequence_ids(SimpleNamespace(generation_config=generation, config=files.config), files.tokenizer)
