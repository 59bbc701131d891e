"""The config of an engine, and what it needs of a cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.errors import InputError

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPUS_OF_AN_ENGINE = 0.9  # two engines and a driver fit on two cores
# Fields that say where and how fast an engine runs, not what it answers.
_ONLY_SPEED = {"device", "batch_size", "tensor_parallel", "gpu_memory", "cache_gib"}
_BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # Intel's, AMD's, ARM's


@dataclass(frozen=True, slots=True)
class Need:
    """What one engine needs; Ray's actors and trials ask for just this."""

    num_cpus: float
    num_gpus: int

    @property
    def options(self) -> dict[str, Any]:
        """As options of a Ray actor or task."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}

    @property
    def bundle(self) -> dict[str, float]:
        """As a bundle of a placement group, or the resources of a trial."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})

    def most(self, cluster: dict[str, float]) -> int:
        """How many such engines have room in a cluster's resources at once, at least one."""
        places = cluster.get("GPU", 0) // self.num_gpus if self.num_gpus else float("inf")
        return max(1, int(min(places, cluster.get("CPU", 0) // self.num_cpus)))


class EngineConfig(Config):
    """Which library runs a model, for what, and how."""

    section = "engine."

    name: Literal["transformers", "vllm"] = "transformers"
    kind: Literal["generate", "reward"] = Field(
        "generate", description="a causal language model, or a reward model"
    )
    head: str | int | None = Field(
        None,
        description="of a reward model with several labels: the one that is the reward",
        exclude_if=lambda head: head is None,  # so that keys of evaluations stay as they were
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU where there is one (vLLM: as its build has it)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's; float32 on a CPU without bf16 instructions"
    )
    batch_size: int = Field(256, ge=1, description="rows at once, with transformers")
    max_length: int | None = Field(None, ge=2, description="tokens of the context; default all")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one engine, with vllm")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory, with vllm")
    cache_gib: float = Field(1.0, gt=0, description="key-value cache on a CPU, with vllm")

    @model_validator(mode="after")
    def _has_effect(self) -> "EngineConfig":
        given = self.model_fields_set
        if self.head is not None and self.kind != "reward":
            raise ValueError("engine.head: has no effect with kind generate")
        without = ("tensor_parallel", "gpu_memory", "cache_gib")
        for field in without if self.name == "transformers" else ("batch_size",):
            if field in given and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"engine.{field}: has no effect with {self.name}")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers of its models depend on, for keys and records."""
        return self.model_dump(mode="json", exclude=_ONLY_SPEED)

    def need(self, cluster: dict[str, float] | None = None) -> Need:
        """What an engine of this config needs.

        Args:
            cluster: resources by name, as from `ray.cluster_resources()`, which tell whether
                there are GPUs; default: what this process sees.
        """
        has_gpu = torch.cuda.is_available() if cluster is None else cluster.get("GPU", 0) > 0
        count = self.tensor_parallel
        if self.device == "cuda" or (self.device == "auto" and has_gpu):
            return Need(CPUS_OF_AN_ENGINE, count)
        return Need(CPUS_OF_AN_ENGINE * count, 0)


def open_engine(path: str | Path, config: EngineConfig | None = None) -> "Engine":
    """Start the engine that a config asks for, with the checkpoint in a folder.

    Raises:
        InputError: no checkpoint that this engine can run, or a library that is not installed.
    """
    config = config or EngineConfig()
    if config.name == "vllm":
        from pipelines.engines.vllm_engine import VllmEngine

        return VllmEngine(path, config)
    from pipelines.engines.transformers_engine import TransformersEngine

    return TransformersEngine(path, config)


def torch_device(config: EngineConfig) -> str:
    """The device of torch that an engine of transformers uses.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("engine.device: found cuda; allowed: cpu, as this machine has no GPU")
    return "cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda"


def computing_dtype(config: EngineConfig, stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype that a model computes in.

    Args:
        stored: the checkpoint's.
        device: "cpu", or anything else.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if stored == torch.bfloat16 and device == "cpu" and not cpu_has_bf16():
        return torch.float32
    return stored


def cpu_has_bf16(description: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for bf16; without them such a model is several times slower
    than in float32. False where the system does not say.
    """
    try:
        lines = description.read_text().splitlines()
    except OSError:
        return False
    flags = (line.partition(":") for line in lines)
    named = {name.strip(): set(value.split()) for name, _, value in flags}
    found = named.get("flags", set()) | named.get("Features", set())
    return bool(found & _BF16_INSTRUCTIONS)
