"""The Ray Serve applications of a server: the gateway, and one of engines for each group of models.

They are applications of their own, so that a group can be added or taken away while the others run.
"""

from typing import TYPE_CHECKING, Any

from pipelines.serve.calls import application
from pipelines.serve.config import Limits
from pipelines.serve.gateway import Gateway
from pipelines.serve.groups import Group
from pipelines.serve.plan import ServerPlan, cpus_of
from pipelines.serve.replica import GATEWAY, EngineReplica

if TYPE_CHECKING:
    from ray.serve import Application

# A gateway holds as many requests as it has let in, and connections beside them.
_CONNECTIONS = 100_000
HEAD = "node:__internal_head__"  # Ray's own resource, of the head alone
_HEALTH: dict[str, Any] = {"health_check_period_s": 2, "health_check_timeout_s": 120}
_TARGET_SHARE = 0.5  # of the requests that an engine works on at once, at which others are added


def build_gateway(
    plan: ServerPlan, keys: dict[str, bytes], environment: dict[str, str]
) -> "Application":
    """The application that listens.

    Args:
        keys: digests of keys that stand in no file.
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
    return deployment.bind(plan.config, plan.groups, plan.configured, keys)


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
    plan: ServerPlan, keys: dict[str, bytes], locks: str, environment: dict[str, str]
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
    gateway = build_gateway(plan, keys, environment)
    return [*engines, RunTarget(gateway, name=GATEWAY, route_prefix="/")]
