"""Trajectories as a Parquet file, a row each, for ``datasets``, pandas, Polars and DuckDB.

Numbers stand in columns of their own; what has no fixed shape (metadata, sampling, limits, provenance, the arguments
and values of tools) stands as JSON text. The JSON lines stay the full record: a table is for reading.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from midstream.errors import ConfigurationError
from midstream.records.schema import SCHEMA, Record

ROWS_TOGETHER = 1000
"""Rows of one row group: as many are in memory at a time."""

COMPRESSION = "zstd"


def write_table(records: Iterable[Record], path: str | os.PathLike[str]) -> int:
    """Write ``records`` as a Parquet file; gives how many there were. The file takes its name when it is whole.

    Columns: ``prompt_id``, ``group``, ``sample``, ``seed``, ``prompt_text``, ``text`` (all that follows the prompt),
    ``generated_text`` (of it what the model wrote), ``ids`` (prompt included), ``mask``, ``logprobs``,
    ``weight_versions`` (each as long as ``ids``), ``prompt_length``, ``stop_kind``, ``stop_detail``, ``reward``,
    ``fit_for_training``, ``discarded``, ``duration`` in seconds, ``blocks`` (a list of structs), and as JSON
    ``messages``, ``metadata``, ``sampling``, ``limits``, ``provenance``.

    Raises :class:`~midstream.errors.ConfigurationError` where pyarrow is not installed, OSError where the file
    cannot be written.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError("a Parquet file needs pyarrow: pip install 'midstream[export]'") from error
    path = Path(path)
    schema = _schema(arrow)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    count = 0
    try:
        with parquet.ParquetWriter(name, schema, compression=COMPRESSION) as writer:
            for rows in _together(map(row_of, records)):
                count += len(rows)
                writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
        mask = os.umask(0o022)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return count


def row_of(record: Record) -> dict[str, Any]:
    """A record as a row of the table, as Python has it."""
    trajectory = record.trajectory
    return {
        "prompt_id": record.prompt.id,
        "group": record.prompt.group or record.prompt.id,
        "sample": record.sample,
        # Seeds take all 64 bits, and not every reader has unsigned numbers.
        "seed": str(record.seed),
        "prompt_text": record.prompt_text,
        "text": trajectory.text,
        "generated_text": "".join(segment.text for segment in record.segments if segment.origin == "generated"),
        "ids": trajectory.ids,
        "mask": trajectory.mask,
        "logprobs": trajectory.logprobs,
        "weight_versions": trajectory.weight_versions,
        "prompt_length": len(record.prompt_ids),
        "stop_kind": str(record.stop.kind),
        "stop_detail": record.stop.detail,
        "reward": record.reward,
        "fit_for_training": record.fit_for_training,
        "discarded": record.discarded,
        "duration": record.duration,
        "blocks": [_block(entry) for entry in record.calls],
        "messages": _json(record.prompt.messages),
        "metadata": _json(record.prompt.metadata),
        "sampling": _json(record.sampling),
        "limits": _json(record.limits),
        "provenance": _json(record.provenance),
    }


def _block(entry: Any) -> dict[str, Any]:
    result = entry.result
    error = None if result is None else result.error
    return {
        "code": entry.call.code,
        "position": entry.call.position,
        "declined": entry.call.declined,
        "injected": entry.injected,
        "result": None if result is None else result.text,
        "error": None if error is None else error.type,
        "duration": None if result is None else result.duration,
        "breached": None if result is None else result.breached,
        "tool_calls": _json([] if result is None else result.tool_calls),
        "images": [] if result is None else [{"mime": each.mime, "bytes": each.data} for each in result.media],
    }


def _json(value: Any) -> str:
    return json.dumps(msgspec.to_builtins(value), ensure_ascii=False)


def _together(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while chunk := list(islice(rows, ROWS_TOGETHER)):
        yield chunk


def _schema(arrow: Any) -> Any:
    block = arrow.struct(
        [
            ("code", arrow.string()),
            ("position", arrow.int32()),
            ("declined", arrow.string()),
            ("injected", arrow.string()),
            ("result", arrow.string()),
            ("error", arrow.string()),
            ("duration", arrow.float64()),
            ("breached", arrow.string()),
            ("tool_calls", arrow.string()),
            ("images", arrow.list_(arrow.struct([("mime", arrow.string()), ("bytes", arrow.binary())]))),
        ]
    )
    columns = {
        **dict.fromkeys(("prompt_id", "group"), arrow.string()),
        "sample": arrow.int32(),
        **dict.fromkeys(("seed", "prompt_text", "text", "generated_text"), arrow.string()),
        "ids": arrow.list_(arrow.int32()),
        "mask": arrow.list_(arrow.int8()),
        "logprobs": arrow.list_(arrow.float32()),
        "weight_versions": arrow.list_(arrow.int32()),
        "prompt_length": arrow.int32(),
        **dict.fromkeys(("stop_kind", "stop_detail"), arrow.string()),
        "reward": arrow.float64(),
        "fit_for_training": arrow.bool_(),
        "discarded": arrow.int32(),
        "duration": arrow.float64(),
        "blocks": arrow.list_(block),
        **dict.fromkeys(("messages", "metadata", "sampling", "limits", "provenance"), arrow.string()),
    }
    return arrow.schema(list(columns.items()), metadata={"midstream.schema": str(SCHEMA)})
