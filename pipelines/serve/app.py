"""The Ray Serve application: an OpenAI-compatible ingress and one vLLM engine per model."""

import os
from typing import TYPE_CHECKING, Any

from pipelines.engines.vllm_requests import vllm_device
from pipelines.errors import InputError
from pipelines.serve.models import ServedModel

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.llm import LLMConfig

# CPUs of a replica, which only forwards requests. The engine has its own CPU.
_REPLICA_CPUS = 0.1
# An engine does not answer health checks while it works on a long batch.
_HEALTH_CHECK = {"health_check_period_s": 30, "health_check_timeout_s": 300}
_KV_CACHE_GIB = "1"


def engine_device() -> str:
    """The device of the installed vLLM build: "gpu" or "cpu".

    Raises:
        InputError: vLLM is not installed.
    """
    return "cpu" if vllm_device("serve: vLLM") == "cpu" else "gpu"


def check_servable(models: list[ServedModel], device: str) -> None:
    """Refuse models that the engine would load but could not run.

    Raises:
        InputError: a head size that vLLM's CPU attention does not support.
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
    """The Ray resources that `build_app` needs, including one CPU for Serve's own actors."""
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
    """The `ray.serve.llm` config of one model."""
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
                "max_constructor_retry_count": 1,  # a failed load would only fail again
                "ray_actor_options": {"num_cpus": _REPLICA_CPUS},
            },
            "engine_kwargs": _engine_arguments(model, device),
            "runtime_env": {"env_vars": _engine_environment(device) | environment},
            "callback_config": {"callback_class": "pipelines.serve.local_files.LocalFiles"},
            "log_engine_metrics": False,
        }
    )


def _engine_arguments(model: ServedModel, device: str) -> dict[str, Any]:
    """vLLM's engine arguments: safetensors only; on the CPU the checkpoint's own dtype.

    So a float32 checkpoint gives the same greedy answers as in `poise evaluate`. On a GPU vLLM
    chooses the dtype, because its fast attention has no float32.
    """
    common = {"load_format": "safetensors", "max_model_len": -1}  # -1: as much as the cache holds
    if device == "gpu":
        return common
    return common | {"dtype": model.dtype, "enforce_eager": True}


def _engine_environment(device: str) -> dict[str, str]:
    """vLLM's environment variables: the user's values, or defaults."""
    names = {"VLLM_CPU_KVCACHE_SPACE": _KV_CACHE_GIB} if device == "cpu" else {}
    return {name: os.environ.get(name, value) for name, value in names.items()}
