"""What a name means is changed under load: nothing fails, and no answer is of two models.

Oracle: every answer is drawn again offline, greedily, by the weights that signed it; digests of the
files; what the server's own state says after a restart.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import InputError
from pipelines.serve import host
from pipelines.serve.gateway import SIGNATURE, Gateway
from pipelines.serve.keys import read_keys
from pipelines.serve.names import FILE, Names, Version
from tests.pipelines.serve.conftest import save_model, save_reward
from tests.pipelines.serve.local_server import LocalServer, local_server, wait_for
from tests.pipelines.serve.signed_load import World, ask, load, weights_of
from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama

KEY = "sk-of-those-who-deploy"
TOKENS = 12
WORDS = "abcdefghij"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = World(tmp_path_factory.mktemp("allowed"))
    for seed, name in enumerate(["a", "b", "c"]):
        found.add(name, save_model(found.folder / name, seed + 20))
    wide = {"max_position_embeddings": 512, "initializer_range": 0.5, "num_hidden_layers": 3}
    found.add("deep", save_tiny_llama(found.folder / "deep", 31, **wide))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are led elsewhere at once here."""
    monkeypatch.setattr(host, "SETTLE_S", 0.1)


@contextmanager
def serving(
    world: World, state: Path, engines: int = 2, **more: Any
) -> Iterator[tuple[LocalServer, httpx2.Client]]:
    """A server that has model a under the name m."""
    models = {"m": {"path": str(world.paths["a"]), "replicas": engines}} | more
    allowed = deploying(world, state)
    with (
        local_server(models, state, deploy=allowed, limits={"turn_s": 0.1}) as server,
        httpx2.Client(base_url=server.url, timeout=60) as http,
    ):
        http.headers["authorization"] = f"Bearer {KEY}"
        yield server, http


def deploying(world: World, state: Path) -> dict[str, Any]:
    """The part of a config that lets the key deploy the world's models."""
    (state / "deploy-keys").write_text(KEY)
    return {"folders": [str(world.folder)], "keys_file": str(state / "deploy-keys")}


def change(http: httpx2.Client, what: str, **body: Any) -> httpx2.Response:
    return http.post(f"/admin/{what}", json={"name": "m", **body})


def deploy(http: httpx2.Client, path: Path, **body: Any) -> dict[str, Any]:
    response = change(http, "deploy", path=str(path), **body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("engines", [1, 2])
def test_updates_under_load(engines: int, world: World, tmp_path: Path) -> None:
    with serving(world, tmp_path, engines) as (server, http), load(http) as answers:
        wait_for(lambda: len(answers) > 5)
        for name in ("b", "c", "a", "b"):
            told = deploy(http, world.paths[name])
            assert told["weights"] == world.digests[name]
            assert ask(http, "yes no").weights == world.digests[name]
            count = len(answers)
            wait_for(lambda: len(answers) > count + 5)  # noqa: B023
        [hosts] = server.hosts.values()
        assert {each.announced.weights for each in hosts} == {world.digests["b"]}
    world.check(answers)
    assert set(Counter(each.weights for each in answers)) == {
        world.digests[name] for name in ("a", "b", "c")
    }


def test_an_engine_changes_only_when_it_has_ended_what_it_has(world: World, tmp_path: Path) -> None:
    """One engine of two is busy with a long stream; the other one serves meanwhile."""
    with serving(world, tmp_path) as (_, http):
        messages = [{"role": "user", "content": "a b"}]
        body = {"model": "m", "messages": messages, "max_tokens": 300, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body | {"seed": 1}) as stream:
            lines = stream.iter_lines()
            next(lines)
            deploy(http, world.paths["b"])
            assert ask(http, "a b").weights == world.digests["b"]
            signed = {json.loads(x[6:])["system_fingerprint"] for x in lines if "{" in x}
        assert signed == {world.digests["a"]} == {stream.headers[SIGNATURE]}


def test_a_canary_gets_its_share_until_it_is_promoted(world: World, tmp_path: Path) -> None:
    a, b = world.digests["a"], world.digests["b"]
    with serving(world, tmp_path) as (_, http):
        told = deploy(http, world.paths["b"], canary=20)
        assert (told["weights"], told["canary"]["weights"]) == (a, b)
        answers = [ask(http, f"a {number}") for number in range(10)]
        assert Counter(each.weights for each in answers) == {a: 8, b: 2}
        world.check(answers)
        [model] = http.get("/v1/models").json()["data"]
        assert model["canary"] == {"weights": b, "share": 20}
        refused = change(http, "deploy", path=str(world.paths["c"]))
        assert refused.status_code == 409 and "promote it, or roll it back" in refused.text
        assert change(http, "promote").json()["weights"] == b
        assert {ask(http, f"b {number}").weights for number in range(5)} == {b}
        assert "canary" not in http.get("/v1/models").json()["data"][0]
        again = change(http, "promote")
        assert again.status_code == 409 and "has no canary" in again.text


def test_rolling_back(world: World, tmp_path: Path) -> None:
    """A canary first, then change by change, until there is nothing before."""
    a, b, c = (world.digests[name] for name in "abc")
    with serving(world, tmp_path) as (_, http):
        deploy(http, world.paths["b"], canary=50)
        assert change(http, "rollback").json()["weights"] == a
        assert {ask(http, f"b {number}").weights for number in range(4)} == {a}
        for name in ("b", "c"):
            deploy(http, world.paths[name])
        assert change(http, "rollback").json() | {"canary": None} == {
            "name": "m",
            "weights": b,
            "path": str(world.paths["b"]),
            "before": c,
            "canary": None,
        }
        assert ask(http, "a b").weights == b
        assert change(http, "rollback").json()["weights"] == a
        again = change(http, "rollback")
        assert again.status_code == 409 and "nothing to roll back to" in again.text


def test_a_restart_keeps_what_was_deployed(world: World, tmp_path: Path) -> None:
    a, b, c = (world.digests[name] for name in "abc")
    with serving(world, tmp_path) as (_, http):
        deploy(http, world.paths["b"])
        deploy(http, world.paths["c"], canary=50)
    with serving(world, tmp_path) as (_, http):
        answers = [ask(http, f"a {number}") for number in range(4)]
        assert Counter(each.weights for each in answers) == {b: 2, c: 2}
        world.check(answers)
        assert change(http, "promote").json()["weights"] == c
    with serving(world, tmp_path) as (_, http):
        assert ask(http, "a b").weights == c
        assert [change(http, "rollback").json()["weights"] for _ in range(2)] == [b, a]
    assert not json.loads((tmp_path / FILE).read_text())["names"]


def test_another_shape_gets_engines_before_the_old_ones_stop(world: World, tmp_path: Path) -> None:
    with serving(world, tmp_path) as (server, http), load(http) as answers:
        [old] = server.hosts
        deploy(http, world.paths["deep"], canary=50)
        assert len(server.hosts) == 2
        count = len(answers)
        wait_for(lambda: len(answers) > count + 10)
        change(http, "promote")
        [new] = server.hosts
        assert new != old
        assert ask(http, "a b").weights == world.digests["deep"]
        assert change(http, "rollback").json()["weights"] == world.digests["a"]
        assert set(server.hosts) == {old}
    world.check(answers)
    with serving(world, tmp_path) as (server, http):
        deploy(http, world.paths["deep"])
        plan, first = server.plan, server.gateway
        anew = Gateway(
            plan.config,
            plan.groups,
            plan.configured,
            {},
            plan.meant,
            lambda key, _: server.hosts[key],
        )
        assert anew.groups["m"].key == new  # one that died and is started as it was at first
        assert anew.homes.current(new) == first.homes.current(new)
    with serving(world, tmp_path) as (server, http):
        assert set(server.hosts) == {new}
        assert ask(http, "a b").weights == world.digests["deep"]


def test_models_that_share_engines_are_changed_alone(world: World, tmp_path: Path) -> None:
    other = {"other": {"path": str(world.paths["b"])}}
    with (
        serving(world, tmp_path, 1, **other) as (_, http),
        load(http, "other", 2) as others,
        load(http, "m", 2) as answers,
    ):
        wait_for(lambda: len(others) > 2 and len(answers) > 2, 30)
        deploy(http, world.paths["c"])
        count = len(answers)
        wait_for(lambda: len(answers) > count + 4, 30)
    assert {each.weights for each in others} == {world.digests["b"]}
    assert {each.weights for each in answers} == {world.digests[name] for name in "ac"}
    world.check(answers + others)


def test_rewards_are_deployed_as_well(world: World, tmp_path: Path) -> None:
    one, two = (save_reward(world.folder / f"reward{n}", n) for n in (1, 2))
    reward = {"r": {"path": str(one), "kind": "reward"}}
    with serving(world, tmp_path, 1, **reward) as (_, http):
        response = http.post("/admin/deploy", json={"name": "r", "path": str(two)})
        assert response.json()["weights"] == weights_of(two), response.text
        asked = {"model": "r", "prompt": "a b", "responses": ["c"]}
        assert http.post("/v1/rewards", json=asked).json()["weights"] == weights_of(two)


def spoiled(world: World, tmp_path: Path, kind: str) -> Path:
    """A copy of model b with one defect."""
    folder = Path(shutil.copytree(world.paths["b"], world.folder / f"bad-{kind}-{tmp_path.name}"))
    file, tensors = folder / WEIGHTS, load_file(folder / WEIGHTS)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "corrupted":
        file.write_bytes(file.read_bytes()[:8] + b"x" * 30 + file.read_bytes()[38:])
    elif kind == "flipped":
        record = {"weights": world.digests["b"], "companions": "", "inputs": {}}
        (folder / "poise.json").write_text(json.dumps(record))
        data = bytearray(file.read_bytes())
        data[-4] ^= 1  # of a mantissa
        file.write_bytes(data)
    elif kind == "missing":
        file.unlink()
    else:
        name = "model.norm.weight"
        tensors[name] = torch.full((32 if kind == "nan" else 40,), torch.nan)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


DEFECTS = {
    "truncated": "truncated",
    "corrupted": "header is damaged",
    "flipped": "its poise.json describes",
    "missing": "no model.safetensors",
    "nan": "model.norm.weight: holds NaN or Inf",
    "shape": "model.norm.weight: found shape [40]; allowed: [32]",
}


def test_bad_checkpoints_are_refused_and_the_old_one_serves(world: World, tmp_path: Path) -> None:
    with serving(world, tmp_path) as (_, http), load(http) as answers:
        for kind, said in DEFECTS.items():
            response = change(http, "deploy", path=str(spoiled(world, tmp_path, kind)))
            assert response.status_code == 400, kind
            line = response.json()["error"]["message"]
            assert said in line and "\n" not in line
            assert ask(http, "a b").weights == world.digests["a"]
        assert not (tmp_path / FILE).exists()
    assert {each.weights for each in answers} == {world.digests["a"]}
    world.check(answers)


def test_weights_that_the_engine_does_not_take(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that change after they were looked at: engines that changed go back."""
    folder = spoiled(world, tmp_path, "nan")
    version = Version("f" * 32, str(folder))
    with serving(world, tmp_path) as (server, http):
        [group] = server.gateway.homes.known().values()

        async def examined(name: str, path: str, *, is_known: bool) -> Any:
            return type(group)(group.key, group.engine, group.replicas, 1, version, (name,))

        deployments = server.gateway.deployments
        monkeypatch.setattr(deployments._engines, "examined", examined)
        response = change(http, "deploy", path=str(folder))
        assert response.status_code == 400 and "holds NaN or Inf" in response.text
        assert {ask(http, f"a {n}").weights for n in range(4)} == {world.digests["a"]}
        [hosts] = server.hosts.values()
        wait_for(lambda: {h.announced.weights for h in hosts} == {world.digests["a"]})
    assert not (tmp_path / FILE).exists()


def test_one_change_at_a_time_and_one_whose_client_leaves(world: World, tmp_path: Path) -> None:
    with serving(world, tmp_path) as (_, http):
        with pytest.raises(httpx2.TimeoutException):
            body = {"name": "m", "path": str(world.paths["b"])}
            http.post("/admin/deploy", json=body, timeout=0.2)
        busy = change(http, "rollback")
        assert busy.status_code == 409 and "is being changed" in busy.text
        assert busy.headers["retry-after"] == "5"
        wait_for(lambda: ask(http, "a b").weights == world.digests["b"])


@pytest.fixture(scope="module")
def refusing(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A server for requests that it refuses."""
    reward = {"r": {"path": str(save_reward(world.folder / "reward", 9)), "kind": "reward"}}
    with serving(world, tmp_path_factory.mktemp("state"), 1, **reward) as (_, http):
        yield http


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"name": "n", "path": "x"}, 404, "model: found 'n'; allowed: m, r"),
        ({"name": "m"}, 400, "path: required"),
        ({"name": "m", "path": "x", "canari": 3}, 400, "canari: unknown field"),
        ({"name": "m", "path": "x", "canary": 0}, 400, "canary: "),
        ({"name": "m", "path": "x", "canary": 100}, 400, "canary: "),
        ({"name": "m", "path": "/etc"}, 400, "path: found /etc; allowed: below "),
        ({"name": "m", "path": "{folder}/../elsewhere"}, 400, "allowed: below "),
        ({"name": "m", "path": "{folder}/link"}, 400, "allowed: below "),
        ({"name": "m", "path": "{folder}/absent"}, 400, "no such directory"),
        ({"name": "m", "path": "{folder}/reward"}, 400, "allowed: a causal language model"),
        ({"name": "r", "path": "{folder}/b"}, 400, "allowed: a sequence classification model"),
        ([], 400, "body: found list; allowed: a JSON object"),
    ],
)
def test_what_cannot_be_deployed(
    body: Any, status: int, said: str, refusing: httpx2.Client, world: World
) -> None:
    link = world.folder / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(save_outside(world.folder.parent / "outside"))
    text = json.dumps(body).replace("{folder}", str(world.folder))
    response = refusing.post("/admin/deploy", content=text)
    assert response.status_code == status, response.text
    line = response.json()["error"]["message"]
    assert said in line and "\n" not in line


def save_outside(folder: Path) -> Path:
    return folder if folder.exists() else save_model(folder, 1)


def test_rolling_back_to_where_nothing_may_be_deployed_from(world: World, tmp_path: Path) -> None:
    """The config's own model lies elsewhere; one that has changed since is not taken."""
    outside = Path(shutil.copytree(world.paths["a"], tmp_path / "outside"))
    models = {"m": {"path": str(outside)}}
    headers = {"authorization": f"Bearer {KEY}"}
    with (
        local_server(models, tmp_path, deploy=deploying(world, tmp_path)) as server,
        httpx2.Client(base_url=server.url, headers=headers) as http,
    ):
        deploy(http, world.paths["b"])
        assert "allowed: below" in change(http, "deploy", path=str(outside)).text
        assert change(http, "rollback").json()["weights"] == world.digests["a"]
        deploy(http, world.paths["b"])
        shutil.copy(world.paths["c"] / WEIGHTS, outside / WEIGHTS)
        response = change(http, "rollback")
        assert response.status_code == 409
        assert f"holds the weights {world.digests['c']}; allowed: " in response.text
        assert ask(http, "a b").weights == world.digests["b"]


def test_a_model_that_does_not_answer(world: World, tmp_path: Path, monkeypatch) -> None:
    """The engine takes it, but the first question gets no numbers."""
    with serving(world, tmp_path) as (server, http):
        [pool] = server.gateway.homes.pools.values()
        once = pool.once

        async def silent(method: str, version: Version, *arguments: Any) -> Any:
            found = await once(method, version, *arguments)
            if version.weights == world.digests["b"]:
                return found[0], []
            return found

        monkeypatch.setattr(pool, "once", silent)
        response = change(http, "deploy", path=str(world.paths["b"]))
        assert response.status_code == 400 and "answers with no finite numbers" in response.text
        [hosts] = server.hosts.values()
        wait_for(lambda: {h.announced.weights for h in hosts} == {world.digests["a"]})
        assert ask(http, "a b").weights == world.digests["a"]


def test_keys_for_deploying_are_others(world: World, tmp_path: Path) -> None:
    models = {"m": {"path": str(world.paths["a"])}}
    api = "sk-of-those-who-ask-only"
    keys, allowed = read_keys(api, "here"), deploying(world, tmp_path)
    with local_server(models, tmp_path, keys, deploy=allowed) as server:
        for key, path, status in (
            (None, "/admin/rollback", 401),
            (api, "/admin/rollback", 401),
            (KEY, "/admin/rollback", 409),
            (KEY, "/v1/models", 401),
            (api, "/v1/models", 200),
        ):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            method = "GET" if "models" in path else "POST"
            response = httpx2.request(
                method, f"{server.url}{path}", content='{"name": "m"}', headers=headers
            )
            assert response.status_code == status
            assert KEY not in response.text and api not in response.text
    log = (tmp_path / "requests.jsonl").read_text()
    assert KEY not in log and api not in log
    with local_server(models, tmp_path / "other") as server:
        response = httpx2.post(f"{server.url}/admin/rollback", json={"name": "m"})
        assert response.status_code == 403 and "deploy: is off" in response.text


def test_names_keep_what_they_were_given(tmp_path: Path) -> None:
    one, two, three = (Version(digit * 32, f"/{digit}") for digit in "123")
    names = Names({"m": one, "n": one}, tmp_path)
    names.change("m", two)
    names.try_out("m", three, 30)
    assert Counter(names.pick("m") for _ in range(1000)) == {two: 700, three: 300}
    names = Names({"m": one, "n": one}, tmp_path)
    assert names.meant == {"m": (two, three), "n": (one, None)}
    names.drop("m")
    names.back("m")
    assert Names({"m": one}, tmp_path).meant == {"m": (one, None)}
    assert Names({"m": three}, tmp_path).meant == {"m": (three, None)}  # another path counts
    assert names.uses("m", one) and not names.uses("m", two)


def test_the_command(world: World, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("POISE_DEPLOY_KEY", KEY)
    with serving(world, tmp_path) as (server, _):

        def run(*arguments: object) -> tuple[int, str, str]:
            status = poise(monkeypatch, "deploy", *arguments, "--url", server.url)
            shown = capsys.readouterr()
            return status, shown.out, shown.err

        a, b = world.digests["a"], world.digests["b"]
        path = world.paths["b"]
        status, out, _ = run("m", path, "--canary", 10)
        assert (status, out) == (0, f"m: 10% of requests {b} ({path}), the others {a}\n")
        assert run("--promote", "m")[1] == f"m: {b} ({path}), was {a}\n"
        status, out, _ = run("--rollback", "m", "--json")
        assert json.loads(out)["weights"] == a
        status, out, err = run("--rollback", "m")
        assert (status, out) == (2, "")
        assert err == f"poise: {server.url}: status 409: m: has nothing to roll back to\n"
        for arguments, said in (
            (("m",), "NAME PATH: required, or --promote NAME, or --rollback NAME"),
            (("m", path, "--promote", "m"), "--promote m: allowed: alone, with --url and a key"),
            (("--promote", "m", "--rollback", "m"), "--promote m: allowed: alone"),
        ):
            status, out, err = run(*arguments)
            assert status == 2 and said in err and err.count("\n") == 1
        monkeypatch.setenv("POISE_DEPLOY_KEY", "sk-another-that-is-wrong")
        status, out, err = run("--rollback", "m")
        assert status == 2 and "status 401" in err and "sk-another" not in err
        monkeypatch.delenv("POISE_DEPLOY_KEY")
        assert "POISE_DEPLOY_KEY: not set" in run("--rollback", "m")[2]
    monkeypatch.setenv("POISE_DEPLOY_KEY", KEY)
    status, _, err = run("--rollback", "m")  # the server has ended
    assert status == 1 and "cannot be reached" in err


def test_a_server_where_nobody_could_deploy_does_not_start(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POISE_DEPLOY_KEYS", raising=False)
    models = {"m": {"path": str(world.paths["a"])}}
    for keys, said in (
        ({}, r"deploy: needs a key; allowed: deploy\.keys_file or POISE_DEPLOY_KEYS"),
        ({"keys_file": str(tmp_path / "absent")}, r"deploy\.keys_file: .* cannot be read"),
    ):
        allowed = {"folders": [str(world.folder)], **keys}
        with (
            pytest.raises(InputError, match=said),
            local_server(models, tmp_path, deploy=allowed),
        ):
            pass
    monkeypatch.setenv("POISE_DEPLOY_KEYS", KEY)
    with local_server(models, tmp_path, deploy={"folders": [str(world.folder)]}):
        pass
