"""The config of a server: which models, on which engines, within which limits."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config import Config
from pipelines.engines import EngineConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ServedEngine(EngineConfig):
    """The engine of all models; what it computes stands with each model."""

    name: Literal["transformers", "vllm"] = "vllm"

    @model_validator(mode="after")
    def _of_models(self) -> "ServedEngine":
        for field in {"kind", "head"} & self.model_fields_set:
            raise ValueError(f"engine.{field}: has no effect here; allowed: models.NAME.{field}")
        return self


class Replicas(Config):
    """Bounds of autoscaling; equal ones are a fixed number."""

    min: int = Field(1, ge=1, description="engines that are always there")
    max: int = Field(1, ge=1, description="engines at the most")

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, found: Any) -> Any:
        """A number alone is a fixed one, and so is `min` without `max`."""
        if isinstance(found, int):
            return {"min": found, "max": found}
        if isinstance(found, dict) and "max" not in found and "min" in found:
            return {**found, "max": found["min"]}
        return found

    @model_validator(mode="after")
    def _in_order(self) -> "Replicas":
        if self.max < self.min:
            raise ValueError(f"max: found {self.max}; allowed: min ({self.min}) or more")
        return self


class ServedConfig(Config):
    """One model."""

    path: str = Field(description="a checkpoint's folder, or ORG/NAME on the hub")
    kind: Literal["generate", "reward"] = Field(
        "generate", description="answers, or rewards of conversations"
    )
    head: str | int | None = Field(
        None, description="of a reward model with several labels: the one that is the reward"
    )
    replicas: Replicas = Field(
        default_factory=Replicas,
        description="engines: a number, or `{min, max}`, between which it follows the load",
    )
    cpus: int | None = Field(
        None,
        ge=1,
        description="cores of each engine, where it runs on a CPU; default: an equal share of them",
    )
    max_queued: int = Field(
        64, ge=0, description="requests that may wait; further ones are told to come back (429)"
    )
    share: bool = Field(
        True, description="models of the same shapes share engines, which change their weights"
    )

    @model_validator(mode="after")
    def _has_effect(self) -> "ServedConfig":
        if self.head is not None and self.kind != "reward":
            raise ValueError("head: has no effect with kind generate")
        return self


class Limits(Config):
    """What one request may ask for, and how long it may take."""

    section = "limits."

    max_body_mib: float = Field(8.0, gt=0, description="of a request's body")
    max_tokens: int = Field(4096, ge=1, description="of one answer")
    max_n: int = Field(16, ge=1, description="answers to one prompt")
    max_batch: int = Field(1024, ge=1, description="prompts or conversations in one request")
    max_running: int = Field(64, ge=1, description="requests that one engine works on at once")
    turn_s: float = Field(
        1.0, ge=0, description="how long models that share an engine wait for it before it changes"
    )
    max_wait_s: float = Field(60.0, gt=0, description="longest wait for an engine; then 503")
    timeout_s: float = Field(600.0, gt=0, description="longest work on one request; then 504")
    body_timeout_s: float = Field(30.0, gt=0, description="for the arrival of a body; then 408")
    grace_s: float = Field(60.0, ge=0, description="for running requests when the server stops")


class LogConfig(Config):
    """The log of requests: one line of JSON each."""

    section = "log."

    file: str | None = Field(None, description="default: requests.jsonl in the folder `state`")
    prompts: bool = Field(False, description="write down what was asked and answered, too")
    max_mib: float = Field(100.0, gt=0, description="of a file, of which five are kept")


class DeployConfig(Config):
    """Who may change what a name means, and to what."""

    section = "deploy."

    folders: list[str] = Field(min_length=1, description="checkpoints below these may be deployed")
    keys_file: str | None = Field(
        None, description="keys for `poise deploy` alone; POISE_DEPLOY_KEYS has further ones"
    )
    spare_engines: int = Field(
        1, ge=0, description="engines for which a local Ray keeps room, for models of other shapes"
    )


Named = Annotated[str, Field(min_length=1)]


class ServeConfig(Config):
    """A server."""

    models: dict[Named, ServedConfig] = Field(min_length=1, description="by their names")
    engine: ServedEngine = Field(default_factory=ServedEngine)
    keys_file: str | None = Field(
        None, description="API keys, one a line; POISE_API_KEYS has further ones"
    )
    deploy: DeployConfig | None = Field(
        None, description="without it names mean what stands here until the server ends"
    )
    state: str = Field("runs/serve", description="the folder of what survives a restart")
    limits: Limits = Field(default_factory=Limits)
    log: LogConfig = Field(default_factory=LogConfig)

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, Any]) -> dict[str, Any]:
        for name in models:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no name; allowed: letters, digits, dots, hyphens, underscores"
                )
        return models
