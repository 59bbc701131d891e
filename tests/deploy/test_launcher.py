"""The configs of Ray's cluster launcher, without a cloud.

Oracle: Ray's own schema, preparation and checks, and for AWS the parameters of its API as botocore
knows them.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

CLOUDS = ("cluster.yaml", "deploy/cluster-gcp.yaml")
CONFIGS = (*CLOUDS, "deploy/cluster-machines.yaml")


def prepared(path: Path) -> dict[str, Any]:
    """A config as `ray up` uses it, after Ray's own checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_ray_takes_the_config(project_root: Path, name: str) -> None:
    config = prepared(project_root / name)
    assert config["cluster_name"] == "poise"
    kinds = config["available_node_types"]
    workers = {kind: kinds[kind] for kind in kinds if kinds[kind]["max_workers"] > 0}
    assert workers
    assert all(kind["min_workers"] == 0 for kind in workers.values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("field", ["idle_timeout_minuts", "setup_comands", "max_worker"])
def test_a_typo_is_refused(tmp_path: Path, project_root: Path, name: str, field: str) -> None:
    text = (project_root / name).read_text() + f"\n{field}: []\n"
    (tmp_path / "typo.yaml").write_text(text)
    with pytest.raises(Exception, match=f"'{field}' was unexpected"):
        prepared(tmp_path / "typo.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_no_work_is_placed_on_the_head_and_a_token_is_asked(project_root: Path, name: str) -> None:
    config = prepared(project_root / name)
    [start] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert {"--head", "--num-cpus=0", "--dashboard-host=127.0.0.1"} <= set(start.split())
    for line in (start, config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in line
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    if name in CLOUDS:
        assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_is_where_a_loss_is_harmless(project_root: Path, name: str) -> None:
    kinds = prepared(project_root / name)["available_node_types"]
    on_spot = {kind for kind in kinds if "spot" in str(kinds[kind]["node_config"]).lower()}
    assert on_spot == {"cpu_worker", "gpu_worker"}
    assert all((kinds[kind]["labels"]["market-type"] == "spot") for kind in on_spot)
    assert {kind for kind in kinds if kinds[kind]["resources"].get("GPU")} == {
        "gpu_worker",
        "gpu_server",
    }


ENGINE, TRAINER, MERGER = {"CPU": 1, "GPU": 1}, {"GPU": 1}, {"CPU": 0.9}


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    ("demands", "nodes"),
    [
        ([ENGINE], {"gpu_server": 1}),
        ([ENGINE] * 4, {"gpu_server": 4}),
        ([TRAINER] * 4, {"gpu_worker": 1}),
        ([TRAINER] * 16, {"gpu_worker": 4}),
        ([MERGER] * 16, {"cpu_worker": 1}),
    ],
)
def test_work_gets_the_kind_of_node_that_is_meant_for_it(
    project_root: Path, name: str, demands: list[dict[str, float]], nodes: dict[str, int]
) -> None:
    """By the choice of Ray's own autoscaler."""
    from ray.autoscaler._private import resource_demand_scheduler as scheduler
    from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary

    def score(*arguments: Any) -> Any:
        every_kind = NodeAvailabilitySummary({})
        scorer = scheduler._default_utilization_scorer
        return scorer(*arguments, node_availability_summary=every_kind)

    config = prepared(project_root / name)
    kinds, head = config["available_node_types"], config["head_node_type"]
    chosen, left = scheduler.get_nodes_for(
        kinds, {}, head, config["max_workers"], demands, utilization_scorer=score
    )
    assert (dict(chosen), left) == (nodes, [])


@pytest.mark.parametrize("name", CLOUDS)
def test_every_node_installs_the_locks(project_root: Path, name: str) -> None:
    """By `make setup`: CUDA's on the head and where there are GPUs, else the CPU's."""
    config = prepared(project_root / name)
    common = config["worker_setup_commands"]
    for kind, settings in config["available_node_types"].items():
        lines = "\n".join(settings.get("worker_setup_commands", common))
        if kind == config["head_node_type"]:
            lines = "\n".join(config["head_setup_commands"])
        build = "cpu" if kind == "cpu_worker" else "cuda"
        assert re.findall(r"make setup TORCH=(\w+)", lines) == [build], kind
        assert "uv python install 3.11" in lines
    project = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]
    pins = set(re.findall(r"torch==[\d.]+", (project_root / name).read_text()))
    assert pins <= set(project["dependencies"])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_sent_stays_off_the_nodes(project_root: Path, name: str) -> None:
    excluded = {
        pattern.removeprefix("**/") for pattern in prepared(project_root / name)["rsync_exclude"]
    }
    lines = (project_root / ".rayignore").read_text().split("\n")
    large = {
        line.rstrip("/")
        for line in lines
        if line.rstrip("/") in (".git", ".venv", ".bench", "runs")
    }
    assert large <= excluded


def test_every_node_reaches_the_storage(project_root: Path) -> None:
    for name in CONFIGS:
        lines = prepared(project_root / name)["initialization_commands"]
        assert "mkdir -p /shared/runs" in lines[-1]


def test_aws_knows_every_field(project_root: Path) -> None:
    import botocore.session
    from botocore.validate import ParamValidator

    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    kinds = prepared(project_root / "cluster.yaml")["available_node_types"]
    for kind in kinds.values():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert ParamValidator().validate(request, shape).generate_report() == ""
    wrong = ParamValidator().validate({**request, "InstanceMarketOption": {}}, shape)
    assert "InstanceMarketOption" in wrong.generate_report()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_to_be_filled_in_is_said(project_root: Path, name: str) -> None:
    """Names between < and > are the only ones that are not somebody's defaults, and hold no key."""
    text = (project_root / name).read_text()
    assert "Fill in what stands between < and >" in text.replace("\n# ", " ")
    assert re.findall(r"<[a-z][\w/-]*>", text)
    assert not re.search(r"AKIA|hf_[A-Za-z]{10}|-----BEGIN", text)
