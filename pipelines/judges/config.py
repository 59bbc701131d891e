"""The config of judged tasks: entries of `tasks:` with the field `judged`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config import Config
from pipelines.engines import EngineConfig

ProtocolName = Literal[
    "mt_bench", "alpaca_eval", "halueval_wild", "salad_bench", "or_bench", "refusal", "prompts"
]
# Which protocols a field has an effect with; fields that are not here have one with all.
_ONLY: dict[str, set[str]] = {
    "references": {"mt_bench"},
    "baseline": {"alpaca_eval"},
    "difficulty": {"alpaca_eval"},
    "order": {"alpaca_eval"},
    "columns": {"halueval_wild", "salad_bench", "or_bench", "refusal", "prompts"},
}


class JudgeConfig(Config):
    """Who judges: a model at an endpoint, or a checkpoint in an engine here."""

    section = "judge."

    model: str = Field(description="its name at the endpoint; without one, a checkpoint's folder")
    endpoint: str | None = Field(None, description="such as https://api.openai.com/v1")
    version: str | None = Field(None, description="of the endpoint's model, where its name is none")
    key_env: str | None = Field(None, description="environment variable that holds the key")
    parameters: dict[str, Any] = Field({}, description="further fields of each request")
    concurrency: int = Field(16, ge=1, le=1000, description="calls at once")
    calls_per_minute: float | None = Field(None, gt=0, description="at most; default no limit")
    timeout_s: float = Field(120.0, gt=0, description="of one call")
    retries: int = Field(5, ge=0, le=100, description="of a call that fails")
    backoff_s: float = Field(1.0, ge=0, description="before the first retry; doubles up to 60")
    engine: EngineConfig | None = Field(None, description="of a checkpoint")

    @model_validator(mode="after")
    def _has_effect(self) -> "JudgeConfig":
        if self.endpoint is not None:
            if self.engine is not None:
                raise ValueError("judge.engine: has no effect with an endpoint")
            return self
        for name in ("version", "key_env", "parameters", "concurrency", "calls_per_minute"):
            self._refuse(name)
        for name in ("timeout_s", "retries", "backoff_s"):
            self._refuse(name)
        return self

    def _refuse(self, name: str) -> None:
        if getattr(self, name) != type(self).model_fields[name].default:
            raise ValueError(f"judge.{name}: has no effect without judge.endpoint")

    @field_validator("engine")
    @classmethod
    def _generates(cls, engine: EngineConfig | None) -> EngineConfig | None:
        if engine is not None and engine.kind != "generate":
            raise ValueError("kind: found reward; allowed: generate")
        return engine


class AnswerSampling(Config):
    """How the measured models answer; the default is greedy."""

    temperature: float = Field(0.0, ge=0, lt=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _has_effect(self) -> "AnswerSampling":
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("sampling: top_p and top_k have no effect at temperature 0")
        return self


class JudgedSet(Config):
    """A judged task."""

    judged: ProtocolName = Field(description="the protocol; prompts: any, with a template")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="the column's; default the protocol's"
    )
    judge: JudgeConfig
    data: Path | dict[Literal["development", "test"], Path] = Field(
        description="JSON or JSONL of the prompts; one file is the test split"
    )
    references: Path | None = Field(None, description="reference answers (mt_bench)")
    baseline: Path | None = Field(None, description="answers to compare with (alpaca_eval)")
    difficulty: Path | None = Field(None, description="the published df_gamed.csv (alpaca_eval)")
    columns: dict[Literal["id", "prompt", "reference", "category", "cluster"], str] = Field(
        {}, description="what the data calls them"
    )
    template: str | None = Field(None, description="a file, or alpaca-eval:FILE of that package")
    parser: dict[str, Any] | None = Field(None, description="instead of the template's")
    order: Literal["drawn", "both"] = Field(
        "drawn", description="of the two answers: drawn by the seed, or each once"
    )
    repeats: int = Field(1, ge=1, le=100, description="times that each question is asked")
    max_calls: int | None = Field(None, ge=1, description="of the judge in one run")
    max_invalid: float = Field(0.05, ge=0, le=1, description="share of unreadable verdicts")
    max_new_tokens: int | None = Field(None, ge=1, description="of an answer; default by protocol")
    sampling: AnswerSampling | None = Field(None, description="of answers; default by protocol")

    @model_validator(mode="after")
    def _has_effect(self) -> "JudgedSet":
        for field, protocols in _ONLY.items():
            if field in self.model_fields_set and self.judged not in protocols:
                raise ValueError(f"{field}: has no effect with judged: {self.judged}")
        if self.repeats > 1 and self.judge.endpoint is None:
            raise ValueError("repeats: has no effect with a checkpoint, which always says the same")
        if self.judged == "alpaca_eval" and self.baseline is None:
            raise ValueError("baseline: required with judged: alpaca_eval")
        if self.judged == "prompts" and self.template is None:
            raise ValueError("template: required with judged: prompts")
        return self

    @property
    def column(self) -> str:
        """The task's name."""
        return self.name or self.judged
