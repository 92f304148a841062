"""A preallocated KV cache whose rows have lengths of their own.

Keys and values are ``[places, heads, capacity, head size]`` in each layer. An id at position ``p`` of the
row at place ``r`` lies at ``[r, :, p]``: no padding and no holes, so rolling a row back is forgetting its
length, and a result is written behind what is there. The cache itself knows no lengths. Each forward pass
is told by a :class:`Pass` where its keys go and what they may see; what lies beyond a row's length is
stale and masked, and is overwritten before it can be seen.

The last position of each place is scratch: padding and idle rows write there. All that is ever read is
finite (memory starts as zeros), since even a masked NaN would spoil an attention's sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_LENGTH_STEP = 64
_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Pass:
    """Where one forward pass of ``rows`` rows and ``queries`` ids a row writes and reads.

    - ``places``: the rows' places, ``[rows]``, int64; ``extent``: the same as a slice where they are
      neighbours in order (then reading copies nothing).
    - ``targets``: the position each key is written to, ``[rows, queries]``, int64; ``start``: the first
      of them where every row writes to the same unbroken stretch, else None.
    - ``width``: how many positions are read. 0: nothing is cached yet, the pass attends to itself alone.
    """

    places: Tensor
    extent: slice | None
    targets: Tensor
    start: int | None
    width: int

    def write(self, stored: Tensor, states: Tensor) -> None:
        """Put ``states``, ``[rows, heads, queries, head size]``, where they belong."""
        if self.extent is not None and self.start is not None:
            stored[self.extent, :, self.start : self.start + states.shape[2]] = states
        else:
            places, targets = self.places.to(stored.device), self.targets.to(stored.device)
            stored[places[:, None], :, targets] = states.transpose(1, 2)

    def read(self, stored: Tensor) -> Tensor:
        """What the rows may see, ``[rows, heads, width, head size]``."""
        read = stored[:, :, : self.width]
        return read[self.extent] if self.extent is not None else read[self.places.to(stored.device)]


class RaggedCache(Cache):  # type: ignore[misc]
    """The cache of all rows, given to the model as ``past_key_values``.

    ``limit``: the most positions a row ever needs, or None. ``places`` and ``capacity`` say what is
    allocated now (``capacity`` counts the scratch position). While the model runs, ``now`` holds what it computes; of
    several groups that are packed into one pass, ``where`` says the place and the position of each id, ``[ids]`` both.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(layer_class_to_replicate=self._new_layer)
        self.limit = limit
        self.places = 0
        self.capacity = 0
        self.now: Sequence[Pass] = ()
        self.where: Sequence[Tensor] = ()

    def _new_layer(self) -> RaggedLayer:
        return RaggedLayer(self)

    @property
    def scratch(self) -> int:
        """The position for what must not be kept."""
        return self.capacity - 1

    @property
    def memory(self) -> int:
        """Bytes that the keys and values of all layers take."""
        return sum(stored.nbytes for layer in self.layers for stored in layer.stored())

    @property
    def position_bytes(self) -> int:
        """Bytes that the keys and values of one position take in one layer; 0 before the first pass."""
        stored = self.layers[0].stored() if self.layers else ()
        return sum(one.shape[1] * one.shape[3] * one.element_size() for one in stored)

    def reserve(self, places: int, length: int) -> None:
        """Make room for ``places`` rows of ``length`` ids; what is cached stays. Grows, never shrinks."""
        if length + 1 > self.capacity:
            wanted = max(length + 1, int(self.capacity * _GROWTH))
            if self.limit is not None:
                wanted = max(length + 1, min(wanted, self.limit + 1))
            self.capacity = -(-wanted // _LENGTH_STEP) * _LENGTH_STEP
        self.places = max(self.places, places)
        for layer in self.layers:
            layer.fit(self.places, self.capacity)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one place to another."""
        for layer in self.layers:
            for stored in layer.stored():
                stored[target, :, :length] = stored[source, :, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first ``length`` positions of two places."""
        for layer in self.layers:
            for stored in layer.stored():
                kept = stored[first, :, :length].clone()
                stored[first, :, :length] = stored[second, :, :length]
                stored[second, :, :length] = kept

    def clear(self, place: int) -> None:
        """Write zeros over a place."""
        for layer in self.layers:
            for stored in layer.stored():
                stored[place] = 0


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer. Allocated at the first pass, when their shapes and dtype are known."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        places, capacity = self._cache.places, self._cache.capacity
        self.keys, self.values = (
            states.new_zeros(places, states.shape[1], capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def stored(self) -> Sequence[Tensor]:
        return (self.keys, self.values) if self.is_initialized else ()

    def fit(self, places: int, capacity: int) -> None:
        if self.is_initialized and self.keys.shape[0:3:2] != (places, capacity):
            self.keys = _grown(self.keys, places, capacity)
            self.values = _grown(self.values, places, capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values, ``[rows, heads, queries, head size]``; return what it may see.

        Of a pass that is packed of several groups, ``[1, heads, ids, head size]``, all that is cached is returned.
        """
        groups = self._cache.now
        if not groups:
            raise RuntimeError("a ragged cache was given to the model outside a pass of its engine")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(groups) > 1:
            for stored, states in ((self.keys, key_states), (self.values, value_states)):
                places, targets = (which.to(stored.device) for which in self._cache.where)
                stored[places, :, targets] = states[0].transpose(0, 1)
            return self.keys, self.values
        (now,) = groups
        now.write(self.keys, key_states)
        now.write(self.values, value_states)
        return (now.read(self.keys), now.read(self.values)) if now.width else (key_states, value_states)

    def get_seq_length(self) -> int:
        width = self._width()
        return width - self._cache.now[0].targets.shape[1] if width else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._width() or query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _width(self) -> int:
        """How many positions a pass of one group reads; of others the model is not to know."""
        now = self._cache.now
        return now[0].width if len(now) == 1 else 0


def _grown(stored: Tensor, places: int, capacity: int) -> Tensor:
    grown = stored.new_zeros(places, stored.shape[1], capacity, stored.shape[3])
    grown[: stored.shape[0], :, : stored.shape[2]] = stored
    return grown
