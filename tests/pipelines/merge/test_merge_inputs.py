"""Bad inputs: one exact line each, and nothing left behind.

Oracle: lines written by hand, and the folder as it was before.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, load_merge_config, merge
from tests.pipelines.merge.conftest import Family, save_weights, set_config, weights_of

NORM = "model.norm.weight"


def refused(family: Family, out: Path, method: str = "linear", **fields: object) -> str:
    """The one line a merge is refused with; the folder of `out` must stay empty."""
    config = MergeConfig.model_validate(family.config(method, **fields))
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(InputError) as caught:
        merge(config, out)
    assert list(out.parent.iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(path: Path, name: str, values: torch.Tensor | None) -> Path:
    """Replace or remove one tensor of a checkpoint; returns its file."""
    tensors = weights_of(path)
    del tensors[name]
    save_weights(path, tensors if values is None else tensors | {name: values})
    return path / "model.safetensors"


def test_missing_model(family: Family, tmp_path: Path) -> None:
    models = [{"model": str(family.models[0])}, {"model": str(tmp_path / "none")}]
    message = refused(family, tmp_path / "o" / "out", models=models)
    assert message == f"model {tmp_path}/none: no such directory"


def test_an_address_as_a_model(family: Family, tmp_path: Path) -> None:
    models = [{"model": str(family.models[0])}, {"model": "s3://bucket/model"}]
    message = refused(family, tmp_path / "o" / "out", models=models)
    assert message == "model s3:/bucket/model: found an address; allowed: a folder"


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors"])
def test_an_index_of_files_elsewhere(own_family: Family, tmp_path: Path, name: str) -> None:
    model = own_family.models[0]
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: name}}))
    message = refused(own_family, tmp_path / "o" / "out")
    assert message == f"{index}: weight_map: found {name!r}; allowed: files of the same folder"


def test_an_output_that_cannot_be_made(family: Family, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = MergeConfig.model_validate(family.config("linear"))
    message = rf"^{tmp_path}/file: no folder can be made in it \(Not a directory\)"
    with pytest.raises(InputError, match=message):
        merge(config, tmp_path / "file" / "out")


def test_different_shapes(own_family: Family, tmp_path: Path) -> None:
    file = change(own_family.models[1], NORM, torch.ones(31))
    first = own_family.models[0] / "model.safetensors"
    assert refused(own_family, tmp_path / "o" / "out") == (
        f"{file}: {NORM}: found shape [31]; allowed: [32], as in {first}"
    )


def test_missing_tensor(own_family: Family, tmp_path: Path) -> None:
    change(own_family.models[1], NORM, None)
    first = own_family.models[0] / "model.safetensors"
    assert refused(own_family, tmp_path / "o" / "out") == (
        f"model {own_family.models[1]}: has no tensor '{NORM}', which {first} has"
    )


def test_extra_tensor(own_family: Family, tmp_path: Path) -> None:
    model = own_family.models[2]
    save_weights(model, weights_of(model) | {"model.extra.weight": torch.ones(3)})
    assert refused(own_family, tmp_path / "o" / "out") == (
        f"model {own_family.models[0]}: has no tensor 'model.extra.weight', "
        f"which {model}/model.safetensors has"
    )


def test_truncated_file(own_family: Family, tmp_path: Path) -> None:
    file = own_family.models[1] / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 10)
    message = refused(own_family, tmp_path / "o" / "out")
    assert message.startswith(f"{file}: truncated: ")
    assert message.endswith(f"ends at byte {size} of {size - 10}")
    os.truncate(file, 5)
    message = refused(own_family, tmp_path / "o" / "out")
    assert message == f"{file}: not a safetensors file, or a truncated one (5 bytes)"


def test_damaged_header(own_family: Family, tmp_path: Path) -> None:
    file = own_family.models[0] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"[[[["
    file.write_bytes(data)
    message = refused(own_family, tmp_path / "o" / "out")
    assert message == f"{file}: its safetensors header is damaged"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_weights(own_family: Family, tmp_path: Path, value: float) -> None:
    values = torch.ones(32)
    values[13] = value
    file = change(own_family.models[1], NORM, values)
    message = refused(own_family, tmp_path / "o" / "out")
    assert (
        message == f"{file}: {NORM}: holds NaN or Inf; allowed: finite numbers, or the "
        "same infinities in all models (or allow_nonfinite: true)"
    )


def test_pickle_is_refused(own_family: Family, tmp_path: Path) -> None:
    model = own_family.models[1]
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refused(own_family, tmp_path / "o" / "out")
    assert message.startswith(f"model {model}: found pytorch_model.bin, a pickle")
    assert "save_pretrained" in message


def test_quantised_is_refused(own_family: Family, tmp_path: Path) -> None:
    file = own_family.models[0] / "model.safetensors"
    tensors = weights_of(own_family.models[0]) | {NORM: torch.ones(32).to(torch.float8_e4m3fn)}
    save_file(tensors, file)
    message = refused(own_family, tmp_path / "o" / "out")
    assert message.startswith(f"{file}: {NORM}: found dtype F8_E4M3; allowed: F64, F32")
    assert message.endswith("(quantised checkpoints cannot be merged)")


def test_packed_weights_that_differ(own_family: Family, tmp_path: Path) -> None:
    for i, path in enumerate(own_family.models):
        set_config(path, architectures=["OwnForCausalLM"])
        packed = torch.tensor([i], dtype=torch.uint8)
        save_weights(path, weights_of(path) | {"model.packed": packed})
    files = [path / "model.safetensors" for path in own_family.models]
    assert refused(own_family, tmp_path / "o" / "out") == (
        f"{files[1]}: model.packed: bytes that differ from {files[0]}; allowed: the same in all "
        "models, as they may be packed weights"
    )


def test_overflow_of_float16(own_family: Family, tmp_path: Path) -> None:
    for path in own_family.models:
        change(path, NORM, torch.full((32,), 70_000.0))
    message = refused(own_family, tmp_path / "o" / "out", out_dtype="float16")
    assert message.startswith(f"{NORM}: the merged values do not fit into torch.float16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: [", "not valid YAML"),
        ("merge_methd: linear", "merge_methd: unknown field; allowed: "),
        ("merge_method: tise", "merge_method: found 'tise'; allowed: linear"),
        (
            "merge_method: ties\nparameters: {density: 1.5}",
            "density: found 1.5; allowed: above 0 and at most 1",
        ),
        ("merge_method: ties", "density: required, not given; allowed: above 0 and at most 1"),
        ("merge_method: linear\nparameters: {wieght: 1}", "wieght: unknown parameter; allowed: "),
        ("merge_method: linear\nparameters: {weight: high}", "weight: found 'high'; allowed: "),
        (
            "merge_method: linear\nnum_workers: 0",
            "num_workers: found 0; allowed: greater than or equal to 1",
        ),
        ("merge_method: linear\nout_dtype: int8", "out_dtype: found 'int8'; allowed: 'float32'"),
    ],
)
def test_config_mistakes(family: Family, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "merge.yaml"
    models = "".join(f"  - model: {path}\n" for path in family.models)
    if "linear" not in text:
        models += f"base_model: {family.base}\n"
    file.write_text(f"{text}\nmodels:\n{models}")
    with pytest.raises(InputError) as caught:
        load_merge_config(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_existing_output_is_not_touched(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    config = MergeConfig.model_validate(family.config())
    with pytest.raises(InputError) as caught:
        merge(config, out)
    assert str(caught.value) == (
        f"{out}: exists already; choose another output, or --force to replace it"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "precious"
    merge(config, out, force=True)
    assert not (out / "mine.txt").exists()
    assert (out / "poise.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_simulated(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    message = refused(family, tmp_path / "o" / "out")
    assert message.startswith(f"{tmp_path}/o: no room on the disk: the output takes ")


def test_full_disk(family: Family, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs rights that this user does not have")
    try:
        message = refused(family, disk / "out")
        assert message.startswith(f"{disk}: no room on the disk: the output takes ")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_device_that_the_method_does_not_use(family: Family) -> None:
    with pytest.raises(ValueError, match="device: has no effect with linear; allowed with tsvm"):
        MergeConfig.model_validate(family.config("linear", device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(family: Family, tmp_path: Path) -> None:
    message = refused(family, tmp_path / "o" / "out", "tsvm", device="cuda")
    assert message == "device: found cuda; allowed: cpu, as this machine has no GPU"


@pytest.mark.parametrize("deeper", [0, 1])
def test_a_layer_that_not_all_have_is_never_left_out(
    deeper: int, own_family: Family, tmp_path: Path
) -> None:
    """Whichever of the models is the deeper one, and the base too."""
    for path in (own_family.models[deeper], own_family.base):
        tensors = weights_of(path)
        extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items()}
        before = dict(tensors)
        save_weights(path, tensors | extra)
        method = "task_arithmetic" if path == own_family.base else "linear"
        assert "has no tensor 'model.layers.2." in refused(own_family, tmp_path / "o" / "x", method)
        save_weights(path, before)


def test_an_output_in_the_place_of_an_input(own_family: Family) -> None:
    """Not even by force."""
    config = MergeConfig.model_validate(own_family.config())
    before = weights_of(own_family.models[0])
    for out in (own_family.models[0], own_family.models[0].parent):
        with pytest.raises(InputError, match="is or holds an input of the merge; choose another"):
            merge(config, out, force=True)
    assert all(torch.equal(weights_of(own_family.models[0])[n], t) for n, t in before.items())
