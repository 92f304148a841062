"""What a run is to do: everything that can be wrong with it is found before its model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from midstream.cli.model import ModelFiles, open_model
from midstream.cli.options import named_options
from midstream.cli.prompts import PromptOfFile, read_prompts
from midstream.cli.served import Served, served_of
from midstream.cli.tool_files import load_tools
from midstream.engines.base import prompt_seed
from midstream.errors import ConfigurationError, RecordError
from midstream.families import named_markup
from midstream.markup import Markup
from midstream.records import Record, RecordWriter
from midstream.row import Row
from midstream.sandbox import SandboxLimits, SandboxPool
from midstream.tools import ToolSet
from midstream.types import Limits, Prompt, Sampling, StopKind, StopReason, Trajectory
from midstream.vocabulary import replace_surrogates


@dataclass(slots=True)
class Plan:
    """A run that is known to be possible, before its model is loaded. ``pool``: makes it, given its observers."""

    out: str
    num_samples: int
    batch_size: int
    seed: int
    limits: Limits
    sampling: Sampling
    markup: Markup | None
    files: ModelFiles
    tools: list[Any]
    pool: Callable[..., SandboxPool] | None
    settings: dict[str, Any]
    prompts: list[PromptOfFile]
    server: Served | None = None
    encoded: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.prompts) * self.num_samples

    def encode(self) -> None:
        """Encode every prompt and see that a row can start from it."""
        for item in self.prompts:
            try:
                ids = self.files.vocabulary.encode_prompt(item.prompt)
                Row(
                    item.prompt,
                    self.files.tokenizer,
                    self.markup,
                    self.limits,
                    prompt_ids=ids,
                    context_length=self.files.context_length,
                )
            except ConfigurationError as error:
                raise ConfigurationError(f"{item.place}: {error}") from error
            except Exception as error:  # a chat template is a program, and refuses as it likes
                raise ConfigurationError(f"{item.place}: {type(error).__name__}: {error}") from error
            self.encoded[str(item.prompt.id)] = ids

    def known(self, record: Record) -> None:
        """Refuse to add to a file whose records were made otherwise."""
        theirs = record.provenance.get("settings")
        if not isinstance(theirs, dict):
            raise RecordError(f"{self.out}: its records were not made by midstream run; give another --out")
        for name in sorted({*theirs, *self.settings}):
            if theirs.get(name) != self.settings.get(name):
                option = "--" + name.replace("_", "-")
                raise RecordError(
                    f"{self.out}: its records were made with {option} {_shown(theirs.get(name))}, not "
                    f"{_shown(self.settings.get(name))}; give the same, or another --out"
                )
        ids = self.encoded.get(str(record.prompt.id))
        if ids is not None and list(ids) != record.prompt_ids:
            raise RecordError(f"{self.out}: its prompt {record.prompt.id!r} is another than that of --prompts")

    def work(self, writer: RecordWriter) -> list[Prompt | Trajectory]:
        """What is not in the file yet: prompts, and for prompts done in part their missing samples."""
        work: list[Prompt | Trajectory] = []
        for item in self.prompts:
            prompt = item.prompt
            missing = [sample for sample in range(self.num_samples) if (prompt.id, sample) not in writer.done]
            if len(missing) == self.num_samples:
                work.append(prompt)
            else:
                work.extend(self._beginning(prompt, sample) for sample in missing)
        return work

    def _beginning(self, prompt: Prompt, sample: int) -> Trajectory:
        """A sample before its first id, as if it had been paused there."""
        return Trajectory(
            prompt=prompt,
            prompt_ids=self.encoded[str(prompt.id)],
            segments=(),
            calls=(),
            stop=StopReason(StopKind.PAUSED),
            sample=sample,
            seed=prompt_seed(self.seed if prompt.seed is None else prompt.seed, str(prompt.id)),
            sampling=self.sampling,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of ``midstream run``, by the names that the command line gives them."""

    model: str
    server: str | None
    served_model: str | None
    text_only: bool
    api_key_env: str | None
    prompts: str
    out: str
    tool_files: tuple[str, ...]
    num_samples: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_new_tokens: int | None
    max_total_tokens: int | None
    max_tool_calls: int | None
    time_limit: float | None
    result_tokens: int
    stop_strings: tuple[str, ...]
    markup: str
    isolation: str
    wall_time: float
    preload: tuple[str, ...]
    batch_size: int
    dtype: str
    device: str | None


def make_plan(options: Options) -> Plan:
    """Everything that can be wrong with a run is found here. The tokenizer is loaded, the weights are not."""
    for name, value in (("temperature", options.temperature), ("time-limit", options.time_limit)):
        if value is not None and not math.isfinite(value):
            raise ConfigurationError(f"--{name} {value}: must be a finite number")
    limits = Limits(
        max_new_tokens=options.max_new_tokens,
        max_total_tokens=options.max_total_tokens,
        max_tool_calls=options.max_tool_calls,
        max_result_tokens=options.result_tokens,
        time_limit=options.time_limit,
        stop_strings=options.stop_strings,
    )
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    markup = markup_of(options.markup)
    prompts = read_prompts(options.prompts, limits)
    server = served_of(
        options.server,
        options.served_model,
        options.text_only,
        options.api_key_env,
        dtype=options.dtype,
        device=options.device,
    )
    tools = load_tools(options.tool_files)
    if tools and markup is None:
        raise ConfigurationError("--tools: with --markup none there is nothing that could call them")
    pool = None
    if markup is not None and markup.runs_code:
        with named_options(wall_time="--wall-time"):
            bounds = SandboxLimits(wall_time=options.wall_time)
        pool = partial(
            SandboxPool,
            isolation=options.isolation,  # type: ignore[arg-type]
            limits=bounds,
            preload=options.preload or None,
        )
        pool()  # refuses what cannot be; it would start when it is used
    files = open_model(options.model, options.dtype, options.device, weights=server is None)
    plan = Plan(
        out=options.out,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        seed=options.seed,
        limits=limits,
        sampling=sampling,
        markup=markup,
        files=files,
        tools=tools,
        pool=pool,
        settings=_settings(options, sampling, files.path, server, ToolSet(tools)),
        prompts=prompts,
        server=server,
    )
    plan.encode()
    return plan


def _settings(options: Options, sampling: Sampling, path: str, server: Served | None, tools: ToolSet) -> dict[str, Any]:
    """What the records of one file have in common."""
    return {
        "model": replace_surrogates(path),
        "dtype": options.dtype,
        "seed": options.seed,
        **asdict(sampling),
        "max_new_tokens": options.max_new_tokens,
        "max_total_tokens": options.max_total_tokens,
        "max_tool_calls": options.max_tool_calls,
        "time_limit": options.time_limit,
        "result_tokens": options.result_tokens,
        "stop": [replace_surrogates(text) for text in options.stop_strings],
        "markup": options.markup,
        "isolation": options.isolation,
        "wall_time": options.wall_time,
        "preload": list(options.preload),
        **({"tools": list(tools.names)} if options.tool_files else {}),
        **({} if server is None else server.settings),
    }


def markup_of(name: str) -> Markup | None:
    """The markup that an option names. Raises :class:`~midstream.errors.MarkupError`."""
    return None if name == "none" else named_markup(name)


def _shown(value: Any) -> str:
    return "unset" if value is None else " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
