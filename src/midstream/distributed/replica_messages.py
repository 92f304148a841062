"""What goes between an engine's face and its replicas: orders there, sampled ids back.

Rows are named by the handles that the face has given them. A replica may be some steps further than what it has been
told: so lengths are absolute, and ids that were sampled before a row was held carry an older ``epoch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from midstream.engines.base import Capabilities, Handle, RowRequest, Update
from midstream.types import Media


@dataclass(frozen=True, slots=True)
class OpenRows:
    """Rows that start from the same ids. ``noise``: the key of a fork's sampling noise, which no request has."""

    handles: tuple[Handle, ...]
    request: RowRequest
    epoch: int
    held: bool = False
    noise: int | None = None


@dataclass(frozen=True, slots=True)
class HoldRow:
    """Hold a row at ``length`` ids; what it has beyond is forgotten."""

    handle: Handle
    length: int
    epoch: int


@dataclass(frozen=True, slots=True)
class ExtendRow:
    handle: Handle
    ids: Sequence[int]
    media: Sequence[Media]


@dataclass(frozen=True, slots=True)
class ForkRow:
    """A held copy of a row as it was at ``length`` ids."""

    handle: Handle
    copy: Handle
    length: int
    noise: int


@dataclass(frozen=True, slots=True)
class CloseRow:
    handle: Handle


RowOrder = OpenRows | HoldRow | ExtendRow | ForkRow | CloseRow


@dataclass(frozen=True, slots=True)
class Sampled:
    """An update by the face's handle, of a row as it was in ``epoch``."""

    epoch: int
    update: Update


@dataclass(frozen=True, slots=True)
class Collected:
    """What came of all steps up to number ``step``."""

    step: int
    sampled: list[Sampled]


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What the engine of a replica is."""

    tokenizer: Any
    capabilities: Capabilities
    context_length: int | None
    eos_ids: frozenset[int]
    weight_version: int
    node_id: str
    process_id: int
