"""A generator over several replicas of a model, and sandboxes on every node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from midstream.distributed.engine import RayEngine
from midstream.distributed.pool import RayPool
from midstream.distributed.replica import UpdateWeights
from midstream.engines.base import Engine
from midstream.errors import ConfigurationError
from midstream.generation import Generator
from midstream.jobs import OwnPool, Pool


class RayGenerator(Generator):
    """As :class:`~midstream.Generator`, with engines as actors. The caller has called ``ray.init``.

    - ``make_engine``: makes the engine; called once in each replica's actor.
    - ``replicas``: how many there are. They start side by side, wherever Ray finds what they ask for, and one
      that dies is replaced.
    - ``resources``: what a replica asks of Ray: options of an actor, such as ``{"num_gpus": 1}``. One CPU and
      ``scheduling_strategy="SPREAD"`` otherwise. A model on the CPU computes in as many threads as it asks for CPUs.
    - ``rows_per_replica``: rows that a replica has at a time, those that wait for their code included; more wait
      for a place. None is any number.
    - ``samples_together``: samples of one prompt that go to the same replica, which computes the prompt once
      for them.
    - ``steps_ahead``: steps that a replica may be further than what its rows have been told. 0 has it wait after
      each step; more hides the network, and throws away so many steps' ids more at the end of each block.
    - ``start_timeout``: seconds that replicas may take to start. Those that are not ready then are gone without.
    - ``pool``: by default a :class:`RayPool`, started and stopped with the generator.
    - ``options``: the generator's others.

    A replica that dies, or whose node does, takes no row with it: its rows go on elsewhere from the ids that they
    have, with their sessions as they are. With keyed sampling noise (:class:`~midstream.Capabilities`) what follows
    is what it would have been. A row that loses its replica more than three times stops for ``engine_failure``.

    Raises :class:`~midstream.errors.ConfigurationError` for options that cannot work, and without a cluster, and
    :class:`~midstream.errors.EngineError` where no replica could be started.
    """

    engine: RayEngine

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        replicas: int = 1,
        resources: Mapping[str, Any] | None = None,
        rows_per_replica: int | None = 256,
        samples_together: int = 8,
        steps_ahead: int = 1,
        start_timeout: float = 600.0,
        pool: Pool | None = None,
        **options: Any,
    ) -> None:
        if "engine" in options:
            raise ConfigurationError("engine: a RayGenerator makes its engines, by make_engine")
        engine = RayEngine(
            make_engine,
            replicas=replicas,
            resources=resources,
            rows_per_replica=rows_per_replica,
            samples_together=samples_together,
            steps_ahead=steps_ahead,
            start_timeout=start_timeout,
        )
        try:
            super().__init__(engine, pool=pool, **options)
        except BaseException:
            engine.shutdown()
            raise

    def close(self) -> None:
        """As :meth:`midstream.Generator.close`; the replicas end too."""
        super().close()
        self.engine.shutdown()

    def update_weights(  # type: ignore[override]  # each replica's engine has weights of its own to change
        self, update: UpdateWeights, version: int, *, keep_cache: bool = False
    ) -> None:
        """Rest, have ``update(engine)`` change the weights of every replica's engine, go on (if not paused).

        ``update`` is run where the replicas are, and has what it needs in it or fetches it (``ray.get`` of a
        reference to the weights, say). It is run again for replicas that start later, so it must bring the weights
        that ``make_engine`` gives to the new ones by itself. A replica where it fails is replaced.

        Raises :class:`~midstream.errors.EngineError` where it fails on all of them; they go on, made anew, with the
        weights that they had; :class:`~midstream.errors.CapabilityError` where the engine tracks no versions; and
        :class:`~midstream.errors.ConfigurationError` for an update that cannot be pickled.
        """
        with self._control.update():
            self.engine.update_weights(update, version, keep_cache=keep_cache)
            self._control.weights_changed(version, cache_kept=keep_cache)

    def _make_pool(self) -> OwnPool:
        return RayPool(observers=self._observers)
