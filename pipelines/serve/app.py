"""The Ray Serve applications of a server: the gateway, and one of engines for each group of models.

They are applications of their own, so that a group can be added or taken away while the others run.
"""

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError
from pipelines.serve.calls import application
from pipelines.serve.config import Limits, ServeConfig
from pipelines.serve.gateway import Gateway
from pipelines.serve.groups import Group
from pipelines.serve.plan import ServerPlan, available_memory, check_memory, cpus_of
from pipelines.serve.replica import GATEWAY, EngineReplica
from pipelines.serve.validation import examine

if TYPE_CHECKING:
    from ray.serve import Application

# A gateway holds as many requests as it has let in, and connections beside them.
_CONNECTIONS = 100_000
HEAD = "node:__internal_head__"  # Ray's own resource, of the head alone
_HEALTH: dict[str, Any] = {"health_check_period_s": 2, "health_check_timeout_s": 120}
_TARGET_SHARE = 0.5  # of the requests that an engine works on at once, at which others are added


def build_gateway(
    plan: ServerPlan,
    keys: dict[str, bytes],
    deploy_keys: dict[str, bytes],
    locks: str,
    environment: dict[str, str],
) -> "Application":
    """The application that listens.

    Args:
        keys, deploy_keys: digests of keys that stand in no file.
        locks: the folder in which engines share out a machine's cores.
        environment: variables of its process.
    """
    from ray import serve

    deployment = serve.deployment(
        name="gateway",
        num_replicas=1,
        max_ongoing_requests=_CONNECTIONS,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={
            "num_cpus": 0,  # a cluster's head may have none to give
            "resources": {HEAD: 0.001},  # where the state, the keys and the log are
            "runtime_env": {"env_vars": environment},
        },
        **_HEALTH,
    )(Gateway)
    engines = None if plan.config.deploy is None else ServeEngines(plan.config, locks, environment)
    return deployment.bind(
        plan.config,
        plan.groups,
        plan.configured,
        keys,
        meant=plan.meant,
        engines=engines,
        deploy_keys=deploy_keys,
    )


def build_engines(
    group: Group, limits: Limits, locks: str, environment: dict[str, str]
) -> "Application":
    """The application of one group's engines.

    Args:
        locks: the folder in which engines share out a machine's cores.
        environment: variables of their processes.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    need = group.engine.need()
    actor: dict[str, Any] = {"num_cpus": cpus_of(group), "num_gpus": need.num_gpus}
    router: dict[str, Any] = {
        "request_router_class": "pipelines.serve.router.ByWeights",
        "request_routing_stats_period_s": 0.3,
    }
    deployment = serve.deployment(
        name="engine",
        max_ongoing_requests=limits.max_running,
        max_constructor_retry_count=2,  # a failed load would only fail again
        graceful_shutdown_timeout_s=max(limits.grace_s, 1),
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(**router),
        ray_actor_options={**actor, "runtime_env": {"env_vars": environment}},
        **_HEALTH,
        **_size(group, limits),
    )(EngineReplica)
    return deployment.bind(group, limits, locks)


@dataclass(frozen=True, slots=True)
class ServeEngines:
    """Starts and stops groups' engines on Ray Serve, from inside the gateway.

    Attributes:
        locks: the folder in which engines share out a machine's cores.
        environment: variables of their processes.
    """

    config: ServeConfig
    locks: str
    environment: dict[str, str]

    async def examined(self, name: str, path: str, *, is_known: bool) -> Group:
        """As `examine`, in a process of its own."""
        import ray

        task: Any = ray.remote(examine).options(
            num_cpus=0, max_retries=2, runtime_env={"env_vars": self.environment}
        )
        try:
            found: Group = await task.remote(name, path, self.config, is_known=is_known)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        return found

    async def start(self, group: Group) -> None:
        """As `Engines.start`."""
        from ray import serve

        if not os.environ.get("RAY_ADDRESS"):
            check_memory([group], available_memory())
            _check_room(group)
        target = build_engines(group, self.config.limits, self.locks, self.environment)
        where = application(group.key)
        try:
            await asyncio.to_thread(serve.run, target, name=where, route_prefix=None)
        except RuntimeError:  # Serve's word for engines that do not start
            await self.stop(group.key)
            raise InputError(f"path: {group.first.path}: its engines did not start") from None

    async def stop(self, key: str) -> None:
        """As `Engines.stop`."""
        from ray import serve

        await asyncio.to_thread(serve.delete, application(key))


def _check_room(group: Group) -> None:
    """Raise InputError where a local Ray has no room for a group's engines, which would wait."""
    import ray

    free = ray.available_resources()
    needs = {"CPU": cpus_of(group), "GPU": group.engine.need().num_gpus}
    for name, each in needs.items():
        if (amount := group.replicas.min * each) > free.get(name, 0):
            raise InputError(
                f"path: its shape needs engines of its own, with {amount:g} {name}; found "
                f"{free.get(name, 0):g} free (deploy.spare_engines keeps room)"
            )


def _size(group: Group, limits: Limits) -> dict[str, Any]:
    """How many engines, or between which bounds."""
    if group.replicas.min == group.replicas.max:
        return {"num_replicas": group.replicas.min}
    return {
        "autoscaling_config": {
            "min_replicas": group.replicas.min,
            "initial_replicas": group.replicas.min,
            "max_replicas": group.replicas.max,
            "target_ongoing_requests": max(1, limits.max_running * _TARGET_SHARE),
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        }
    }


def targets(
    plan: ServerPlan,
    keys: dict[str, bytes],
    deploy_keys: dict[str, bytes],
    locks: str,
    environment: dict[str, str],
) -> list[Any]:
    """All applications, as `serve.run_many` takes them."""
    from ray.serve import RunTarget

    engines = [
        RunTarget(
            build_engines(group, plan.config.limits, locks, environment),
            name=application(group.key),
            route_prefix=None,
        )
        for group in plan.groups
    ]
    gateway = build_gateway(plan, keys, deploy_keys, locks, environment)
    return [*engines, RunTarget(gateway, name=GATEWAY, route_prefix="/")]
