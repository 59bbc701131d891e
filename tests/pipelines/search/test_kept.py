"""What merges keep in memory between them, and the digest of what streams into an engine.

Oracle: the same merge, written by `merge` and read back from the disk.
"""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.merging import METHODS
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from pipelines.engines import EngineConfig
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.engines.weights import MergeWeights
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from pipelines.merge.card import digest_of_companions
from pipelines.merge.coefficients import Coefficients, Settings
from pipelines.merge.kept import Kept
from pipelines.merge.plan import Opened
from tests.tiny_models import save_tiny_llama

# Of each method its parameters, with two settings: what is kept of one must not pass for the other.
PARAMETERS: dict[str, tuple[dict[str, Any], ...]] = {
    "linear": ({"weight": 0.3}, {"weight": 0.6, "normalize": False}),
    "passthrough": ({}, {"scale": 0.5}),
    "rewarded_soup": ({"weight": [0.5, 0.5]}, {"weight": [0.2, 0.8]}),
    "task_arithmetic": ({"lambda": 0.7}, {"weight": 0.4}),
    "ties": ({"density": 0.3}, {"density": 0.3, "lambda": 2.0}, {"density": 0.4}),
    "dare_linear": ({"density": 0.5}, {"density": 0.5, "rescale": "l1", "weight": 0.5}),
    "dare_ties": ({"density": 0.5}, {"density": 0.6, "lambda": 0.5}),
    "della_linear": ({"density": 0.5, "epsilon": 0.2}, {"density": 0.5, "epsilon": 0.1}),
    "della": ({"density": 0.5, "epsilon": 0.2}, {"density": 0.5, "epsilon": 0.2, "weight": 0.3}),
    "breadcrumbs": ({"density": 0.5, "gamma": 0.1}, {"density": 0.5, "gamma": 0.2}),
    "breadcrumbs_ties": ({"density": 0.5, "gamma": 0.1}, {"density": 0.7, "gamma": 0.1}),
    "composed": (
        {"sparsifier": "top", "consensus": "sum", "density": 0.5},
        {"sparsifier": "top", "consensus": "sign_elect", "density": 0.5, "scope": "model"},
    ),
    "model_stock": ({}, {"scope": "row"}),
    "slerp": ({"t": 0.3}, {"t": 0.7}),
    "nuslerp": ({"weight": 0.5}, {"weight": 0.2, "nuslerp_flatten": False}),
    "multislerp": ({}, {"weight": 0.4}),
    "karcher": ({"max_iter": 3}, {"max_iter": 9}),
    "nearswap": ({"t": 0.01}, {"t": 0.05}),
    "arcee_fusion": ({"tukey_fence": 0.5}, {"tukey_fence": 1.0}),
    "expo": ({"alpha": 0.3}, {"alpha": 0.1}),
    "m3_average": ({"mixup_alpha": 0.4}, {"mixup_alpha": 0.9}),
    "m3_task_arithmetic": ({"mixup_alpha": 0.4}, {"mixup_alpha": 0.4, "lambda": 0.5}),
    "m3_ties": ({"mixup_alpha": 0.4, "density": 0.5}, {"mixup_alpha": 0.9, "density": 0.5}),
    "sce": ({"select_topk": 0.4}, {"select_topk": 0.7}),
    "tsvm": ({}, {"lambda": 0.5}),
    "r_tsvm": ({}, {"lambda": 0.5}, {"rank_coupling": 0.5}),
    "dam": ({"coefficients": 1}, {"coefficients": 2}),  # the seed of a file
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models near it, in bfloat16 with a tied head, which one of them stores."""
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny_llama(folder / "base", 0, tied=True, dtype=torch.bfloat16)
    found = [base]
    for seed in (1, 2):
        other = shutil.copytree(base, folder / f"model-{seed}")
        checkpoint, random = Checkpoint.open(base), torch.Generator().manual_seed(seed)
        tensors = {
            name: checkpoint.read(name).view(t.shape) for name, t in checkpoint.tensors.items()
        }
        for tensor in tensors.values():
            tensor += (0.02 * torch.randn(tensor.shape, generator=random)).to(tensor.dtype)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        found.append(other)
    return found


@pytest.fixture(scope="module")
def engine(models: list[Path]) -> Iterator[TransformersEngine]:
    """A warm engine with the base."""
    engine = TransformersEngine(models[0], EngineConfig(dtype="float32"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def kept() -> Kept:
    """What all merges of this file leave."""
    return Kept(1 << 26)


def coefficients_of(models: list[Path], seed: int) -> str:
    """A file of random coefficients of the linear layers."""
    random, base = torch.Generator().manual_seed(seed), Checkpoint.open(models[0])
    tensors = {
        name: torch.randn((2, each.shape[-1]), generator=random)
        for name, each in base.tensors.items()
        if "proj" in name
    }
    settings = Settings(models=[str(each) for each in models[1:]], base_model=str(models[0]))
    path = models[0].parent / f"coefficients-{seed}.safetensors"
    Coefficients(str(path), settings, tensors).write(path)
    return str(path)


def config_of(models: list[Path], method: str, parameters: dict[str, Any]) -> MergeConfig:
    """A merge of as many models as the method takes; a list of weights is one for each."""
    entry, own = METHODS[method], dict(parameters)
    listed = own.pop("weight") if isinstance(own.get("weight"), list) else None
    chosen = models[1:][: entry.num_models[1]]
    entries: list[dict[str, Any]] = [{"model": str(model)} for model in chosen]
    for weight, each in zip(listed or [], entries, strict=False):
        each["parameters"] = {"weight": weight}
    fields: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": own}
    if "coefficients" in own:
        fields["coefficients"] = coefficients_of(models, own.pop("coefficients"))
    if entry.needs_base not in (False, "dare_density"):
        fields["base_model"] = str(models[0])
    return MergeConfig.model_validate(fields)


def test_every_method_is_here() -> None:
    assert PARAMETERS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", PARAMETERS)
def test_what_streams_into_an_engine_is_what_is_written(
    models: list[Path], engine: TransformersEngine, kept: Kept, tmp_path: Path, method: str
) -> None:
    opened = Opened()
    for place, parameters in enumerate(PARAMETERS[method]):
        config = config_of(models, method, parameters)
        plan = plan_merge(config, opened)
        written = merge(config, tmp_path / str(place))
        expected = load_file(Path(written) / "model.safetensors")
        digest = model_digest(Checkpoint.open(written))
        assert digest.companions == digest_of_companions(plan.files)
        for _ in range(2):  # the second time from memory
            streamed = dict(MergeWeights(plan, kept).stream())
            assert streamed.keys() == expected.keys()
            for name, tensor in streamed.items():
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name]), (parameters, name)
        assert engine.swap(MergeWeights(plan, kept)) == digest.weights == engine.weights
        assert digest.weights == json.loads((Path(written) / "poise.json").read_text())["weights"]


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.ungathered])
def test_contexts_do_not_depend_on_what_is_called_ungathered(
    models: list[Path], method: str
) -> None:
    """Oracle: the contexts of a merge with other values of these parameters."""
    parameters = PARAMETERS[method][0]
    other = {"weight": 0.37, "lambda": 1.9}
    if "normalize" in METHODS[method].parameters and method != "composed":
        other["normalize"] = not METHODS[method].parameters["normalize"].default
    plans = [plan_merge(config_of(models, method, p)) for p in (parameters, parameters | other)]
    for one, two in zip(*(plan.tensors.values() for plan in plans), strict=True):
        assert one.parameters != two.parameters
        assert pickle.dumps(one.context()) == pickle.dumps(two.context())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_the_budget_holds_and_changes_no_byte(models: list[Path], share: float) -> None:
    plan = plan_merge(config_of(models, "ties", {"density": 0.3}))
    whole = Kept(1 << 30)
    expected = dict(MergeWeights(plan, whole).stream())
    kept = Kept(int(share * whole.num_bytes))
    for _ in range(3):
        for name, tensor in MergeWeights(plan, kept).stream():
            assert torch.equal(tensor, expected[name])
            assert kept.num_bytes <= kept.budget
    if share >= 0.2:  # a merge goes through its tensors in one order: what was kept is used again
        before = set(kept._entries)
        dict(MergeWeights(plan, kept).stream())
        assert before == set(kept._entries) != set()
        assert kept.num_bytes > 0.5 * kept.budget


def test_what_is_not_used_goes() -> None:
    kept = Kept(100)
    kept.begin()
    kept.add(("old",), 1, 60)
    kept.begin()
    kept.add(("new",), 2, 60)  # the last merge used the old one
    assert (kept.find(("old",)), kept.find(("new",))) == (1, None)
    for _ in range(2):
        kept.begin()
    kept.add(("new",), 2, 60)
    assert (kept.find(("old",)), kept.find(("new",)), kept.num_bytes) == (None, 2, 60)
    assert len(pickle.loads(pickle.dumps(kept))) == 0


def test_models_that_change_are_noticed(models: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(model, tmp_path / model.name) for model in models]
    opened, kept = Opened(), Kept(1 << 26)
    config = config_of(copies, "task_arithmetic", {})
    first = dict(MergeWeights(plan_merge(config, opened), kept).stream())
    opened.check_unchanged()
    shutil.copy(models[0] / "model.safetensors", copies[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"model-1: model.safetensors has changed since the start"):
        opened.check_unchanged()
    second = dict(MergeWeights(plan_merge(config), kept).stream())  # opened anew
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in MergeWeights(plan_merge(config)).stream():
        assert torch.equal(tensor, second[name])
