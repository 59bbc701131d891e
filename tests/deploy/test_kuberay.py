"""The manifests for KubeRay, without a cluster.

Oracle: the schemas of KubeRay's own resources, made strict, in the folder that
POISE_KUBERAY_SCHEMAS names (ray.io_rayclusters.yaml, ...; these tests skip without it);
`kubernetes-validate` for plain objects, where it is installed; Ray's schema of Serve configs; and
rules written by hand.
"""

import copy
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_jobs.cli import app
from ray_jobs.submission import workers

VARIABLE = "POISE_KUBERAY_SCHEMAS"
FILES = ("raycluster", *(f"rayjob-{name}" for name in ("align", "merge", "evaluate", "sweep")))
FILES = (*FILES, "rayservice")


def manifest(root: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((root / "deploy" / "kuberay" / f"{name}.yaml").read_text())


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    """The part that describes a cluster."""
    spec = resource["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods_of(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specs, the head's first."""
    cluster = cluster_of(resource)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def strict(schema: Any) -> Any:
    """A schema that allows no field it does not list, as the API server's strict decoding."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(part) for key, part in schema.items()}
    open_ended = made.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(made.get("properties"), dict) and not open_ended and "type" in made:
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema.Draft7Validator]:
    """By kind."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} names no folder of KubeRay's schemas")
    found = {}
    for path in Path(os.environ[VARIABLE]).glob("ray.io_*.yaml"):
        definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[definition["spec"]["names"]["kind"]] = jsonschema.Draft7Validator(schema)
    return found


def faults(validator: jsonschema.Draft7Validator, resource: dict[str, Any]) -> Iterator[str]:
    """The path of each fault: of an unknown or missing field, that field's own."""
    for error in validator.iter_errors(resource):
        path = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            yield from (f"{path}.{name}" for name in error.instance if name not in known)
        elif error.validator == "required":
            yield from (
                f"{path}.{name}" for name in error.validator_value if name not in error.instance
            )
        else:
            yield path


@pytest.mark.parametrize("name", FILES)
def test_kuberay_takes_the_manifest(
    validators: dict[str, jsonschema.Draft7Validator], project_root: Path, name: str
) -> None:
    resource = manifest(project_root, name)
    assert resource["apiVersion"] == "ray.io/v1"
    assert not list(faults(validators[resource["kind"]], resource))


POD = "spec.headGroupSpec.template.spec"
BOX = f"{POD}.containers.0"
JOB = "spec.rayClusterSpec"
MISTAKES: list[tuple[str, str, str | None, Any]] = [
    # of which file, where, its name in place of the right one (None: the same), its value
    ("raycluster", "spec.headGroupSpec", "headGroupSpecs", ...),
    ("raycluster", "spec.rayVersion", None, 2.6),
    ("raycluster", "spec.authOptions.mode", None, "tokn"),
    ("raycluster", "spec.autoscalerOptions.version", None, "v3"),
    ("raycluster", "spec.autoscalerOptions.idleTimeoutSeconds", "idleTimeoutMinutes", ...),
    ("raycluster", "spec.enableInTreeAutoscaling", None, "yes"),
    ("raycluster", "spec.headGroupSpec.rayStartParams.num-cpus", None, 0),
    ("raycluster", f"{POD}.securityContext.runAsNonRoot", None, "true"),
    ("raycluster", f"{POD}.volumes.0.persistentVolumeClaim.claimName", "claim", ...),
    ("raycluster", f"{BOX}.resources.limits.cpu", None, "two"),
    ("raycluster", f"{BOX}.resources", "resource", ...),
    ("raycluster", f"{BOX}.readinessProbe.exec.command", "comand", ...),
    ("raycluster", f"{BOX}.ports.0.containerPort", None, "gcs"),
    ("raycluster", f"{BOX}.volumeMounts.0.mountPath", "path", ...),
    ("raycluster", f"{BOX}.envFrom.0.secretRef.optional", None, "true"),
    ("raycluster", "spec.workerGroupSpecs.0.maxReplicas", None, "eight"),
    ("raycluster", "spec.workerGroupSpecs.1.template.spec.tolerations.0.effect", "efect", ...),
    ("rayjob-merge", "spec.entrypoint", "entryPoint", ...),
    ("rayjob-merge", "spec.backoffLimit", None, 1.5),
    ("rayjob-merge", f"{JOB}.workerGroupSpecs.0.groupName", "name", ...),
    ("rayservice", "spec.upgradeStrategy.clusterUpgradeOptions.gatewayClassName", "gateway", ...),
    ("rayservice", "spec.serveConfigV2", None, {"applications": []}),
]


@pytest.mark.parametrize(("name", "path", "renamed", "value"), MISTAKES)
def test_a_planted_mistake_is_named_by_its_path(
    validators: dict[str, jsonschema.Draft7Validator],
    project_root: Path,
    name: str,
    path: str,
    renamed: str | None,
    value: Any,
) -> None:
    resource = copy.deepcopy(manifest(project_root, name))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = resource
    for part in parents:
        place = place[part]
    right = place.pop(last)
    place[renamed or last] = right if value is ... else value
    wanted = path if renamed is None else ".".join([*map(str, parents), renamed])
    assert wanted in list(faults(validators[resource["kind"]], resource))


def test_at_least_twenty_mistakes_are_planted() -> None:
    assert len({(name, path) for name, path, _, _ in MISTAKES}) >= 20


def test_kubernetes_takes_the_plain_objects_and_the_pods(project_root: Path) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", exc_type=ImportError)
    from kubernetes_validate.utils import ValidationError

    text = (project_root / "deploy" / "kuberay" / "storage.yaml").read_text()
    things = list(yaml.safe_load_all(text))
    for name in FILES:
        for spec in pods_of(manifest(project_root, name)):
            metadata = {"name": name}
            things.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    version = kubernetes.latest_version()
    for thing in things:
        kubernetes.validate(thing, version, strict=True)
        with pytest.raises(ValidationError, match="sepc"):
            kubernetes.validate({**thing, "sepc": {}}, version, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_pods_run_without_rights_within_limits_and_are_watched(
    project_root: Path, name: str
) -> None:
    pods = pods_of(manifest(project_root, name))
    assert len(pods) > 1
    for pod in pods:
        assert pod["restartPolicy"] == "Never"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {"shared", "memory"} == {volume["name"] for volume in pod["volumes"]}
        for box in pod["containers"]:
            assert box["securityContext"]["allowPrivilegeEscalation"] is False
            assert box["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert box["resources"]["limits"] == box["resources"]["requests"]
            assert {"cpu", "memory"} <= set(box["resources"]["limits"])
            assert {"readinessProbe", "livenessProbe"} <= set(box)
            assert box["envFrom"] == [{"secretRef": {"name": "poise-keys", "optional": True}}]
            assert "env" not in box  # a key would stand in the file


@pytest.mark.parametrize("name", FILES)
def test_clusters_grow_from_a_head_without_work(project_root: Path, name: str) -> None:
    cluster = cluster_of(manifest(project_root, name))
    project = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]
    [ray] = [d for d in project["dependencies"] if d.startswith("ray[")]
    assert cluster["rayVersion"] == ray.partition("==")[2]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    for pod in pods_of(manifest(project_root, name)):
        gpus = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        tag = pod["containers"][0]["image"].rpartition(":")[2]
        assert tag in (
            (f"{project['version']}-cuda",)
            if gpus
            else (f"{project['version']}-cpu", f"{project['version']}-cuda")
        )


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("rayjob")])
def test_jobs_are_commands_of_ours(project_root: Path, name: str) -> None:
    program, command, config, *rest = shlex.split(
        manifest(project_root, name)["spec"]["entrypoint"]
    )
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert (program, f"rayjob-{command}") == ("poise", name)
    assert command in known
    assert config.startswith("/shared/")
    assert any(word.startswith("/shared/") for word in rest)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("rayjob")])
def test_jobs_await_the_gpus_that_their_groups_can_bring(project_root: Path, name: str) -> None:
    resource = manifest(project_root, name)
    environment = yaml.safe_load(resource["spec"].get("runtimeEnvYAML", "env_vars: {}"))
    awaited = json.loads(environment["env_vars"].get(workers.VARIABLE, "{}"))
    most = 0
    for group in cluster_of(resource)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        most += group["maxReplicas"] * int(limits.get("nvidia.com/gpu", 0))
    assert set(awaited) == ({"GPU"} if most else set())
    assert awaited.get("GPU", 0) <= most


@pytest.mark.slow
def test_serve_takes_its_config(project_root: Path) -> None:
    """Ray's schema of the config, and of the application's arguments."""
    from ray.serve.llm import LLMServingArgs
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(manifest(project_root, "rayservice")["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(config).applications
    args = LLMServingArgs.model_validate(application.args)
    assert args.llm_configs[0].model_loading_config.model_source == "/shared/runs/ties"
    wrong = copy.deepcopy(application.args)
    wrong["llm_configs"][0]["engine_kwrgs"] = {}
    with pytest.raises(ValueError, match="engine_kwrgs"):
        LLMServingArgs.model_validate(wrong)


def test_no_key_stands_in_a_manifest(project_root: Path) -> None:
    for path in (project_root / "deploy").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(
                r"AKIA|hf_[A-Za-z]{10}|-----BEGIN|kind: Secret|auth_token:", text
            ) or ("~/.ray/auth_token: ~/.ray/auth_token" in text)
