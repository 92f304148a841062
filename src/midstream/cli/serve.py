"""``midstream serve``: an OpenAI-compatible server that runs the model's code in the middle of its answers."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from midstream.cli import config_file, tool_files
from midstream.cli.frame import command, errors_console
from midstream.cli.model import open_model
from midstream.cli.observers import SPANS_OPTION, check_observers, start_observers
from midstream.cli.options import check_writable, named_options
from midstream.cli.plan import markup_of
from midstream.cli.served import Served
from midstream.engines.server.client import base_url
from midstream.errors import ConfigurationError
from midstream.generation import Generator
from midstream.markup import Markup
from midstream.records import RecordWriter
from midstream.sandbox import SandboxLimits, SandboxPool
from midstream.telemetry import Metrics
from midstream.tools import ToolSet
from midstream.types import Limits, Sampling

_NEEDED = {
    "httpx2": "midstream[serve]",
    "starlette": "midstream[serve]",
    "uvicorn": "midstream[serve]",
    "transformers": "midstream[serve]",
}


@command("serve")
@config_file.OPTION
@click.option("--upstream", required=True, metavar="URL", help="A vLLM or SGLang server, which has the model.")
@click.option(
    "--model",
    required=True,
    metavar="PATH",
    help="The model's folder, or its name on the hub: of it only the "
    "tokenizer, its chat template and the configuration are read.",
)
@click.option("--upstream-model", metavar="NAME", help="Its name there.  [default: the only one that there is]")
@click.option("--upstream-key-env", metavar="NAME", help="The environment variable that holds the upstream's key.")
@click.option("--text-only", is_flag=True, help="For an upstream that gives only text; answers are marked so.")
@click.option(
    "--upstream-patience",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an answer waits for an upstream that fails, before it fails too.",
)
@click.option("--name", metavar="NAME", help="What clients call the model.  [default: its folder's name]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 is any that is free.")
@click.option("--api-keys", metavar="FILE", help="Who may ask: a line for each client, its name and its key.")
@click.option("--open", "everybody", is_flag=True, help="Let everybody ask who can reach --host, without a key.")
@click.option(
    "--instructions",
    default="none",
    show_default=True,
    metavar="none|auto|template|FILE",
    help="What chats begin with: auto tells of code and tools, template leaves tools to the chat template.",
)
@tool_files.OPTION
@click.option("--out", metavar="FILE", help="Records of what was served are appended here.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Where a request gives none.")
@click.option("--max-new-tokens", type=int, default=None, help="Ids of an answer at most, results included.")
@click.option("--max-total-tokens", type=int, default=None, help="All ids of a row.  [default: the model's context]")
@click.option("--max-tool-calls", type=int, default=32, show_default=True, help="Blocks of an answer that are run.")
@click.option("--time-limit", type=float, default=600.0, show_default=True, help="Seconds of an answer.")
@click.option("--result-tokens", type=int, default=1024, show_default=True, help="Ids of a result; longer are cut.")
@click.option("--markup", default="code", show_default=True, metavar="NAME", help="As midstream run takes it.")
@click.option(
    "--isolation",
    type=click.Choice(["auto", "full", "container"]),
    default="auto",
    show_default=True,
    help="What sandboxes must hold; auto is the best that this machine can.",
)
@click.option("--wall-time", type=float, default=10.0, show_default=True, help="Seconds that a block may run.")
@click.option(
    "--preload",
    multiple=True,
    metavar="MODULE",
    help="Sandboxes find it imported; may be given again.  [default: numpy and sympy, where installed]",
)
@click.option("--max-rows", type=int, default=64, show_default=True, help="Answers that are generated at a time.")
@click.option(
    "--max-queue", type=int, default=256, show_default=True, help="Answers that wait; more are refused (503)."
)
@click.option("--max-sessions", type=int, default=None, help="Interpreters at a time.  [default: twice --max-rows]")
@click.option("--rows-per-client", type=int, default=None, help="Answers of one client at a time (429).")
@click.option("--requests-per-minute", type=float, default=None, help="Of one client (429).")
@click.option("--sessions-per-client", type=int, default=16, show_default=True, help="That it names.")
@click.option(
    "--session-idle",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="For which a named session is kept.",
)
@click.option(
    "--grace",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="That answers have to finish when the server is stopped.",
)
@SPANS_OPTION
@click.pass_context
def serve_command(ctx: click.Context, /, config: str | None, spans: str | None, **options: Any) -> int:
    """Serve OpenAI's routes in front of a vLLM or SGLang server, and run the model's code in the middle of its answers.

    Any client of OpenAI's API gets answers with results in them, streamed or whole: completions and chats, by
    POST /v1/completions and /v1/chat/completions. GET /health and GET /metrics are for operators.

    On SIGTERM or Ctrl-C it takes no more requests (503), finishes those under way for --grace seconds, and ends with
    code 0. A second signal ends it at once. docs/serve.md has all of this.

    \b
    Examples:
      midstream serve --upstream http://localhost:8000 --model ./model
      midstream serve --upstream http://localhost:8000 --model ./model --instructions auto --out served.jsonl
      midstream serve --upstream http://gpu:8000 --model ./model --host 0.0.0.0 --api-keys keys.txt
    """
    del config  # its options are among the others
    check_observers(None, spans)
    plan = _plan(_Options(**options))
    with ExitStack() as stack:
        return plan.run(spans, stack, errors_console(ctx))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    upstream: str
    model: str
    upstream_model: str | None
    upstream_key_env: str | None
    text_only: bool
    upstream_patience: float
    name: str | None
    host: str
    port: int
    api_keys: str | None
    everybody: bool
    instructions: str
    tool_files: tuple[str, ...]
    out: str | None
    temperature: float
    max_new_tokens: int | None
    max_total_tokens: int | None
    max_tool_calls: int
    time_limit: float
    result_tokens: int
    markup: str
    isolation: str
    wall_time: float
    preload: tuple[str, ...]
    max_rows: int
    max_queue: int
    max_sessions: int | None
    rows_per_client: int | None
    requests_per_minute: float | None
    sessions_per_client: int
    session_idle: float
    grace: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """A server that is known to be possible before anything is started."""

    options: _Options
    server: Served
    limits: Limits
    sampling: Sampling
    markup: Markup | None
    bounds: Any
    keys: Any
    instructions: str | None
    pool: SandboxPool | None
    metrics: Metrics | None
    tools: list[Any]

    def run(self, spans: str | None, stack: ExitStack, console: Console) -> int:
        from midstream.serve import Service, Traffic, application
        from midstream.serve.running import address_of, bound_socket, run

        options = self.options
        for source in ToolSet(self.tools).sources:
            stack.callback(source.stop)  # it was started as its file was read
        observers = start_observers(None, spans, stack, console)
        if self.metrics is not None:
            observers.append(self.metrics)
        listening = stack.enter_context(_bound(bound_socket, options))
        files = open_model(options.model, "auto", None, weights=False)
        if self.pool is not None:
            stack.enter_context(self.pool)
        engine = self.server.connect(files, options.max_rows, options.upstream_patience)
        stack.callback(engine.shutdown)
        generator = stack.enter_context(
            Generator(
                engine,
                tools=self.tools,
                markup=self.markup,
                limits=self.limits,
                sampling=self.sampling,
                pool=self.pool,
                seed=int.from_bytes(os.urandom(8), "little"),  # a request without a seed has noise of its own
                max_open_rows=options.max_rows,
                hold_sessions=options.session_idle,
                observers=observers,
            )
        )
        record = None if options.out is None else stack.enter_context(RecordWriter(options.out))
        name = options.name or Path(files.path).name

        async def serve() -> None:
            service = Service(
                generator,
                model=name,
                keys=self.keys,
                limits=self.bounds,
                instructions=self.instructions,
                render=_renderer(files.tokenizer, self.tools) if options.instructions == "template" else None,
                record=record,
                provenance={**files.versions, "served_model": name},
            )
            traffic = None if self.metrics is None else Traffic(self.metrics, service)
            app = application(service, traffic)
            level = "none" if self.pool is None else self.pool.report.level
            ready = f"midstream serve: {name} at {address_of(listening)}/v1, isolation {level}"
            await run(app, service, listening, grace=options.grace, ready=lambda: click.echo(ready))

        asyncio.run(serve())
        return 0


def _plan(options: _Options) -> _Plan:
    """Everything that can be wrong with the options is found here."""
    for module, extra in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise ConfigurationError(f"serve needs {module}: pip install '{extra}'")
    from midstream.serve import ApiKeys, ServiceLimits

    if options.upstream_key_env is not None and not os.environ.get(options.upstream_key_env):
        raise ConfigurationError(f"--upstream-key-env {options.upstream_key_env}: no such environment variable is set")
    try:
        url = base_url(options.upstream)
    except ConfigurationError as error:
        raise ConfigurationError(f"--upstream: {error}") from error
    for option, value in (("session-idle", options.session_idle), ("grace", options.grace)):
        if not 0 <= value < float("inf"):
            raise ConfigurationError(f"--{option} {value:g}: must be 0 seconds or more")
    keys = None if options.api_keys is None else ApiKeys(_read_keys(options.api_keys))
    if keys is None and not options.everybody and not _is_loopback(options.host):
        raise ConfigurationError(
            f"--host {options.host}: others can reach it, and run code here: give --api-keys, or --open to let them"
        )
    markup = markup_of(options.markup)
    if options.out is not None:
        check_writable("--out", options.out)
    with named_options(
        rows="--max-rows",
        queue="--max-queue",
        rows_per_client="--rows-per-client",
        requests_per_minute="--requests-per-minute",
        sessions_per_client="--sessions-per-client",
    ):
        bounds = ServiceLimits(
            rows=options.max_rows,
            queue=options.max_queue,
            rows_per_client=options.rows_per_client,
            requests_per_minute=options.requests_per_minute,
            sessions_per_client=options.sessions_per_client,
        )
    tools = tool_files.load_tools(options.tool_files)
    if options.instructions == "template" and not tools:
        raise ConfigurationError("--instructions template: there are no tools to tell of; give --tools")
    metrics = Metrics(_own_registry()) if importlib.util.find_spec("prometheus_client") is not None else None
    pool = None
    if markup is not None and markup.runs_code:
        with named_options(wall_time="--wall-time", max_sessions="--max-sessions"):
            pool = SandboxPool(
                isolation=options.isolation,  # type: ignore[arg-type]
                limits=SandboxLimits(wall_time=options.wall_time),
                preload=options.preload or None,
                max_sessions=2 * options.max_rows if options.max_sessions is None else options.max_sessions,
                observers=() if metrics is None else (metrics,),
            )
    return _Plan(
        options=options,
        server=Served(url, options.upstream_model, options.text_only, options.upstream_key_env),
        limits=Limits(
            max_new_tokens=options.max_new_tokens,
            max_total_tokens=options.max_total_tokens,
            max_tool_calls=options.max_tool_calls,
            max_result_tokens=options.result_tokens,
            time_limit=options.time_limit,
        ),
        sampling=Sampling(options.temperature),
        markup=markup,
        bounds=bounds,
        keys=keys,
        instructions=_instructions(options.instructions, markup, tools),
        tools=tools,
        pool=pool,
        metrics=metrics,
    )


def _own_registry() -> Any:
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


def _bound(bind: Any, options: _Options) -> socket.socket:
    try:
        listening: socket.socket = bind(options.host, options.port)
    except ConfigurationError as error:
        raise ConfigurationError(f"--host, --port: {error}") from error
    return listening


def _read_keys(path: str) -> dict[str, str]:
    """Names by their keys, from lines of a name and a key. No key is in what is raised for a file that is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--api-keys {path}: cannot be read ({error})") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise ConfigurationError(f"--api-keys {path}:{number}: must hold a client's name and its key")
        if words[1] in names:
            raise ConfigurationError(f"--api-keys {path}:{number}: this key is that of {names[words[1]]!r} already")
        names[words[1]] = words[0]
    if not names:
        raise ConfigurationError(f"--api-keys {path}: holds no key")
    return names


def _instructions(given: str, markup: Markup | None, tools: list[Any]) -> str | None:
    if given in ("none", "template"):
        return None
    if given == "auto":
        if markup is None:
            raise ConfigurationError("--instructions auto: with --markup none there is nothing to tell the model of")
        return ToolSet(tools).describe(code=markup.runs_code, markup=markup) or None
    try:
        return Path(given).read_text().strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--instructions {given}: must be none, auto, template or a file ({error})") from error


def _renderer(tokenizer: Any, tools: list[Any]) -> Callable[[list[dict[str, str]]], list[int]]:
    """Makes a chat's ids by the tokenizer's template, with the tools in its own form."""
    schemas = ToolSet(tools).schemas

    def render(messages: list[dict[str, str]]) -> list[int]:
        return list(
            tokenizer.apply_chat_template(messages, tools=schemas, add_generation_prompt=True, return_dict=False)
        )

    return render


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
