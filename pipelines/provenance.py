"""The files beside the weights of every result: its record, `poise.json`, and its model card.

All kinds of results have these fields in the record; some kinds add more:

    schema        2
    kind          merged, aligned, exported or extracted
    weights       the digest of the weights (pipelines/checkpoints/digests.py)
    companions    the digest of the config and tokenizer files
    fingerprint   of config and inputs; it identifies finished work, which is not repeated
    config        as run
    inputs        the inputs that were read: name or path -> its digests
    seed          null where nothing is random
    versions      of Python and of the packages that were used

Records of schema 1 are read as well: see `read_record`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.checkpoints.digests import ModelDigest
from pipelines.checkpoints.reader import read_json
from pipelines.commit import write_atomically
from pipelines.versions import versions

CARD_FILE = "README.md"
SCHEMA = 2

Kind = Literal["merged", "aligned", "exported", "extracted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a model was made.

    Attributes:
        inputs: for each input, the digests of weights and companions, or one fingerprint of both.
        details: further fields of the record, for this kind of result.
        title, summary: of the card; the summary is Markdown.
        base_models, datasets, library: the models it was made from, the hub's data sets it was
            trained on, and the library that loads it, for the card's front matter.
    """

    kind: Kind
    digest: ModelDigest
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, ModelDigest | str]
    seed: int | None
    details: Mapping[str, Any] = field(default_factory=dict)
    title: str
    base_models: Sequence[str]
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    library: str = "transformers"
    summary: str

    def write(self, folder: Path) -> None:
        """Write the card and then the record into the model's folder."""
        write_atomically(folder / CARD_FILE, self.card())
        write_atomically(folder / RECORD_FILE, json.dumps(self.record(), indent=2) + "\n")

    def record(self) -> dict[str, Any]:
        """The content of `poise.json`."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            **asdict(self.digest),
            "fingerprint": self.fingerprint,
            "config": dict(self.config),
            "inputs": {
                name: found if isinstance(found, str) else asdict(found)
                for name, found in self.inputs.items()
            },
            "seed": self.seed,
            **self.details,
            "versions": versions(),
        }

    def card(self) -> str:
        """A Hugging Face model card: front matter, how it was made, config, digests, versions."""
        front = {
            "base_model": list(self.base_models),
            **({"datasets": list(self.datasets)} if self.datasets else {}),
            "library_name": self.library,
            "tags": [*self.tags, "poise"],
        }
        lines = [
            f"- weights: `{self.digest.weights}`",
            f"- config and tokenizer: `{self.digest.companions}`",
        ]
        for name, found in self.inputs.items():
            digest = found if isinstance(found, str) else found.weights
            lines.append(f"- input {name}: `{digest}`")
        installed = ", ".join(f"{name} {version}" for name, version in versions().items())
        config = yaml.safe_dump(dict(self.config), sort_keys=False)
        seed = "" if self.seed is None else f"Seed: {self.seed}. "
        return (
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
            f"# {self.title}\n\n{self.summary}\n\n"
            f"The config, from which it can be made again:\n\n```yaml\n{config}```\n\n"
            f"{seed}Digests:\n\n" + "\n".join(lines) + f"\n\nMade with {installed}.\n"
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a model's folder, with the current fields; None if there is none.

    Raises:
        InputError: it is not valid JSON.
    """
    path = folder / RECORD_FILE
    return renewed(read_json(path)) if path.is_file() else None


def renewed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the current fields.

    Records of schema 1 have `key` instead of a merge's `fingerprint`, and the kind `merge`. Only
    merges have `output`, one fingerprint of weights and companions together.
    """
    result = dict(record)
    if "schema" not in result and result.get("kind") == "merge":
        result |= {"kind": "merged", "fingerprint": result.pop("key", None)}
    return result


def recorded_digest(record: Mapping[str, Any]) -> dict[str, str] | str | None:
    """The digests of the model in its record; the single digest of an older merge; or None."""
    if "weights" in record:
        return {name: record[name] for name in ("weights", "companions")}
    return record.get("output")
