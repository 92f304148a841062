"""Environments for NeMo-RL's rollouts: code that runs in our sandboxes, and search over documents.

::

    from midstream.integrations.nemo_rl import CodeEnvironmentActor

    environment = CodeEnvironmentActor.remote({"num_workers": 16, "terminate_on_evaluation": False})
    run_multi_turn_rollout(..., task_to_env={"code": environment})

They take the place of NeMo-RL's own in ``run_multi_turn_rollout`` and ``run_async_multi_turn_rollout``, as Ray actors;
``CodeEnvironment`` and ``RAGEnvironment`` are the same as plain classes, for which no Ray is needed. For generation
itself there is :func:`midstream.generate_with_code_and_tools`, which takes its ``BatchedDataDict``.
"""

from __future__ import annotations

from typing import Any

from midstream.integrations.nemo_rl.code import CodeEnvConfig, CodeEnvironment
from midstream.integrations.nemo_rl.interface import EnvironmentReturn
from midstream.integrations.nemo_rl.retrieval import RAGEnvConfig, RAGEnvironment
from midstream.integrations.nemo_rl.state import CodeEnvMetadata

__all__ = [
    "CodeEnvConfig",
    "CodeEnvMetadata",
    "CodeEnvironment",
    "CodeEnvironmentActor",
    "EnvironmentReturn",
    "RAGEnvConfig",
    "RAGEnvironment",
    "RAGEnvironmentActor",
    "register",
]


def __getattr__(name: str) -> Any:
    # Made when it is asked for, since only then Ray is needed; NeMo-RL asks by the dotted name.
    if name in ("CodeEnvironmentActor", "RAGEnvironmentActor"):
        from midstream.integrations.nemo_rl import actors

        return getattr(actors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(*, code: str = "midstream_code", retrieval: str = "midstream_rag") -> None:
    """Make the environments known to NeMo-RL under these names, so that its ``create_env`` and configs find them.

    They run in the interpreter that the driver runs in, which has midstream. May be called twice.
    """
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import ENV_REGISTRY, register_env

    for name, actor in ((code, "CodeEnvironmentActor"), (retrieval, "RAGEnvironmentActor")):
        path = f"{__name__}.{actor}"
        ACTOR_ENVIRONMENT_REGISTRY[path] = PY_EXECUTABLES.SYSTEM
        if ENV_REGISTRY.get(name, {}).get("actor_class_fqn") != path:
            register_env(name, path)
