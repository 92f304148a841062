"""Sandboxes and engines on the nodes of a Ray cluster.

::

    import ray
    from midstream.distributed.ray import RayGenerator

    ray.init(address="auto")
    with RayGenerator(make_engine, replicas=4, resources={"num_gpus": 1}) as generator:
        batch = generator.generate(prompts, n=8)
"""

from __future__ import annotations

from midstream.distributed.engine import RayEngine
from midstream.distributed.generator import RayGenerator
from midstream.distributed.pool import RayPool, RayReport

__all__ = ["RayEngine", "RayGenerator", "RayPool", "RayReport"]
