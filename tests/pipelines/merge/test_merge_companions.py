"""Everything beside the weights travels: parts of embedding models, processors, code, licences.

Oracle: the files of the model that the config comes from, byte for byte, and transformers.
"""

import json
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast

from pipelines.checkpoints.companions import companions_of
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from pipelines.merge.verify import verify
from tests.pipelines.merge.conftest import Family, save_weights, weights_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
OWN = {"poise.json", "README.md", "model.safetensors", "config.json"}


def put(folder: Path, place: str, content: object = "text") -> Path:
    """Write a file; anything but text as JSON."""
    file = folder / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def embedding_model(folder: Path, seed: int, *, dense: bool = False) -> Path:
    """A BERT in sentence-transformers' layout: CLS pooling, a dense layer if asked, normalised."""
    put(folder, "vocab.txt", "\n".join(WORDS) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(WORDS), num_hidden_layers=1, **sizes)
    BertModel(config).save_pretrained(folder)
    parts = ["", "1_Pooling", *(["2_Dense"] if dense else []), "3_Normalize"]
    put(folder, "modules.json", [{"idx": n, "path": path} for n, path in enumerate(parts)])
    put(folder, "1_Pooling/config.json", {"pooling_mode_cls_token": True, "seed": seed})
    put(folder, "sentence_bert_config.json", {"max_seq_length": 32})
    put(folder, "config_sentence_transformers.json", {"prompts": {"query": "query: "}})
    if dense:
        put(folder, "2_Dense/config.json", {"in_features": 16, "out_features": 4})
        save_file(
            {"linear.weight": torch.full((4, 16), seed)}, folder / "2_Dense/model.safetensors"
        )
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def merged(out: Path, models: list[Path], method: str = "linear", **fields: object) -> Path:
    entries = [{"model": str(model)} for model in models]
    config = {"merge_method": method, "models": entries, "dtype": "float32"} | fields
    return Path(merge(MergeConfig.model_validate(config), out))


@pytest.mark.parametrize("dense", [False, True])
def test_an_embedding_model_keeps_its_parts(tmp_path: Path, dense: bool) -> None:
    a, b = (embedding_model(tmp_path / n, s, dense=dense) for s, n in enumerate("ab"))
    fields = {"base_model": str(a), "parameters": {"t": 0.5}}
    out = merged(tmp_path / "out", [a, b], "slerp", **fields)
    before, after = files_below(a), files_below(out)
    assert {"modules.json", "1_Pooling/config.json", "vocab.txt"} <= before.keys() - OWN
    for place in before.keys() - OWN:
        assert after[place] == before[place], place
    assert after.keys() == before.keys() | OWN
    plan = plan_merge(MergeConfig.model_validate(json.loads(after["poise.json"])["config"]))
    told = f"{a}: copied as they are, not merged: 2_Dense/model.safetensors"
    assert plan.notices() == ([told] if dense else [])
    assert verify(out, again=True).again
    put(out, "1_Pooling/config.json", {"pooling_mode_cls_token": False})
    assert verify(out).changed == ["companions"]


def test_a_part_in_a_pickle_is_named(tmp_path: Path) -> None:
    """An older layout of 2_Dense: it is not copied, and the output says so."""
    a, b = (embedding_model(tmp_path / n, s, dense=True) for s, n in enumerate("ab"))
    (a / "2_Dense/model.safetensors").rename(a / "2_Dense/pytorch_model.bin")
    config = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}]}
    plan = plan_merge(MergeConfig.model_validate(config))
    assert "2_Dense/config.json" in plan.files.copied
    assert "2_Dense/pytorch_model.bin" not in plan.files.copied
    assert plan.notices() == [
        f"{a}: not copied: 2_Dense/pytorch_model.bin (weights of other formats, or other models)",
        f"{a}/2_Dense/pytorch_model.bin: is a pickle, and so the output lacks this part of the "
        "model; allowed: safetensors",
    ]


CONFIG_CODE = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_a_test"

    def __init__(self, size=8, **kwargs):
        self.size = size
        super().__init__(**kwargs)
"""
MODEL_CODE = """
import torch
from transformers import PreTrainedModel

from .configuration_tiny import TinyConfig

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.map = torch.nn.Linear(config.size, config.size)
        self.post_init()

    def forward(self, x):
        return self.map(x)
"""


def model_with_code(folder: Path, seed: int) -> Path:
    put(folder, "configuration_tiny.py", CONFIG_CODE)
    put(folder, "modeling_tiny.py", MODEL_CODE)
    put(folder, "ran.py", "raise SystemExit('code was run')")
    named = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    config = {"model_type": "tiny_of_a_test", "architectures": ["TinyModel"], "size": 8}
    put(folder, "config.json", config | {"auto_map": named})
    generator = torch.Generator().manual_seed(seed)
    shapes = {"map.weight": (8, 8), "map.bias": (8,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_weights(folder, tensors)
    return folder


def test_code_of_the_model_travels(tmp_path: Path) -> None:
    a, b = (model_with_code(tmp_path / name, seed) for seed, name in enumerate("ab"))
    out = merged(tmp_path / "out", [a, b])
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    expected = (weights_of(a)["map.weight"] + weights_of(b)["map.weight"]) / 2
    assert torch.equal(model.map.weight, expected)
    (a / "modeling_tiny.py").unlink()
    config = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}]}
    [notice] = plan_merge(MergeConfig.model_validate(config)).notices()
    assert notice == "config.json: auto_map names modeling_tiny.py, which its folder does not have"


def test_what_travels_and_what_stays(own_family: Family, tmp_path: Path) -> None:
    """A folder as people have them: of a processor, with exports, checkpoints, logs and caches."""
    first = own_family.models[0]
    travel = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
    travel += ["LICENSE", "USE_POLICY.md", "tokenizer.model", "spiece.model", "vocab.json"]
    travel += ["additional_chat_templates/rag.jinja", "images/logo.png", "readme_tools.py"]
    travel += ["vision-lora/adapter_config.json", "vision-lora/adapter_model.safetensors"]
    stay = ["README.md", "README_zh.md", ".gitattributes", ".cache/huggingface/x.json", "a.pyc"]
    stay += ["__pycache__/m.cpython-311.pyc", "metrics.jsonl", "tensorboard/events.out.tfevents.1"]
    stay += ["vision-lora/README.md", "evals/evaluation.json", "evals/report.html"]
    weights = ["pytorch_model.bin", "rng_state.pth", "tf_model.h5", "flax_model.msgpack"]
    weights += ["model.Q4_K_M.gguf", "consolidated.safetensors", "pytorch_model.bin.index.json"]
    folders = ["checkpoint-5/model.safetensors", "checkpoint-5/trainer_state.json"]
    folders += ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/quantized/config.json"]
    folders += ["original/params.json", "original/consolidated.00.pth"]
    for place in (*travel, *stay, *weights, *folders):
        put(first, place, {} if place.endswith(".json") else place)
    before = files_below(first)
    plan = plan_merge(MergeConfig.model_validate(own_family.config()))
    out = Path(merge(plan.config, tmp_path / "out"))
    after = files_below(out)
    assert {place: after[place] for place in travel} == {place: before[place] for place in travel}
    assert not set(after) & {*stay, *weights, *folders} - {"README.md"}
    assert b"Merge by linear" in after["README.md"]
    [parts, left] = plan.notices()
    assert parts.endswith("not merged: vision-lora/adapter_model.safetensors")
    listed = "checkpoint-5/, consolidated.safetensors, flax_model.msgpack, model.Q4_K_M.gguf, onnx/"
    assert left.startswith(f"{first}: not copied: {listed} and 5 more (weights of other formats")
    # Another evaluation into the model's folder does not make it another model.
    put(out, "evals/evaluation.json", {})
    assert verify(out).output == "same"


def hub_copy(model: Path, cache: Path) -> Path:
    """A model as huggingface_hub keeps it: links to blobs."""
    snapshot = cache / "models--org--tiny" / "snapshots" / "0123abc"
    for number, (place, content) in enumerate(files_below(model).items()):
        blob = cache / "models--org--tiny" / "blobs" / f"{number:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        file = snapshot / place
        file.parent.mkdir(parents=True, exist_ok=True)
        up = "/".join([".."] * (2 + place.count("/")))
        file.symlink_to(f"{up}/blobs/{blob.name}")
    return snapshot


def test_links_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    a, b = (embedding_model(tmp_path / n, s, dense=True) for s, n in enumerate("ab"))
    snapshot = hub_copy(a, tmp_path / "cache")
    out = merged(tmp_path / "out", [snapshot, b])
    found, plain = files_below(out), files_below(merged(tmp_path / "plain", [a, b]))
    different = ["README.md", "poise.json"]
    assert all(found[place] == plain[place] for place in plain if place not in different)
    assert not any(file.is_symlink() for file in out.rglob("*"))
    record, other = (json.loads(each["poise.json"]) for each in (found, plain))
    assert record["companions"] == other["companions"]


@pytest.mark.parametrize("place", ["notes.txt", "1_Pooling/config.json", "prompts", "config.json"])
def test_a_link_that_leads_outside_is_refused(
    own_family: Family, tmp_path: Path, place: str
) -> None:
    first, secret = own_family.models[0], tmp_path / "secret"
    secret.mkdir()
    put(secret, "key", (first / "config.json").read_text())
    (first / place).parent.mkdir(exist_ok=True)
    (first / place).unlink(missing_ok=True)
    target = secret if place == "prompts" else secret / "key"
    (first / place).symlink_to(target)
    with pytest.raises(InputError) as caught:
        merge(MergeConfig.model_validate(own_family.config()), tmp_path / "out")
    assert str(caught.value) == (
        f"{first / place}: is a link to {target}; allowed: links to files of the folder, or to the "
        "blobs of a hub's cache"
    )
    assert not (tmp_path / "out").exists()


def test_links_inside_a_folder(own_family: Family, tmp_path: Path) -> None:
    """They are copied as files; a folder that holds itself is not walked for ever."""
    first = own_family.models[0]
    put(first, "a/real.txt", "real")
    (first / "linked.txt").symlink_to("a/real.txt")
    (first / "a" / "up").symlink_to(first)
    out = Path(merge(MergeConfig.model_validate(own_family.config()), tmp_path / "out"))
    assert (out / "linked.txt").read_text() == "real" and not (out / "linked.txt").is_symlink()
    assert (out / "a" / "real.txt").is_file() and not (out / "a" / "up").exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", 5])
def test_an_index_that_leads_outside_is_refused(
    own_family: Family, tmp_path: Path, name: object
) -> None:
    first = own_family.models[0]
    (first / "model.safetensors").unlink()
    file = put(first, "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(InputError) as caught:
        merge(MergeConfig.model_validate(own_family.config()), tmp_path / "out")
    assert str(caught.value) == (
        f"{file}: weight_map: found {name!r}; allowed: files of the same folder"
    )


def test_a_store_gets_the_folders_too(tmp_path: Path) -> None:
    a, b = (embedding_model(tmp_path / n, s, dense=True) for s, n in enumerate("ab"))
    models = [{"model": str(a)}, {"model": str(b)}]
    config = MergeConfig.model_validate({"merge_method": "linear", "models": models})
    merge(config, f"file://{tmp_path}/there")
    local = merged(tmp_path / "local", [a, b], dtype=None)
    assert files_below(tmp_path / "there") == files_below(local)
    other = config.model_copy(update={"seed": 1})
    put(tmp_path / "there", "old/file.txt")
    merge(other, f"file://{tmp_path}/there", force=True)
    assert files_below(tmp_path / "there").keys() == files_below(local).keys()
    assert not fsspec.filesystem("file").exists(f"{tmp_path}/there/old/file.txt")


def test_files_of_an_adapter_stay_with_the_adapter(own_family: Family, tmp_path: Path) -> None:
    """The config's own model is the adapter's base; its adapter_config.json would make an adapter
    of the output.
    """
    base, adapter = own_family.base, tmp_path / "adapter"
    put(base, "preprocessor_config.json", {"of": "base"})
    settings = {"peft_type": "LORA", "lora_alpha": 2, "base_model_name_or_path": str(base)}
    put(adapter, "adapter_config.json", settings)
    put(adapter, "preprocessor_config.json", {"of": "adapter"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        put(adapter, name, (base / name).read_text())
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(48, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    out = merged(tmp_path / "out", [adapter, own_family.models[0]])
    assert not (out / "adapter_config.json").exists()
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"of": "base"}
    generation = (out / "generation_config.json").read_bytes()
    assert generation == (base / "generation_config.json").read_bytes()
    assert "adapter_config.json" in companions_of(adapter).files
