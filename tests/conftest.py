"""Fixtures for all tests: one Ray for the whole run, a hub and an object store on loopback."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import constants

from pipelines.checkpoints import remembered
from pipelines.hub import client
from pipelines.hub.offline import ASKED_OFFLINE
from ray_jobs.session import quiet_environment, ray_session
from tests.hub_stub import Stub, running_hub

# Files that take minutes begin first, so that no worker waits for one at the end.
LONGEST = ("test_demo.py", "test_align_kills.py")

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub
quiet_environment()


def pytest_configure() -> None:
    """Let Ctrl-C act in tests: a shell's background job begins with SIGINT ignored, and so would
    the processes that tests start and interrupt.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by file: those of the longest files first, the others as they were found."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _own_memory_of_answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands and workers of this run remember of architectures stays in its own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(remembered.VARIABLE, str(tmp_path_factory.mktemp("poise-cache")))
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A hub on loopback that this process and those it starts ask, with an empty cache."""
    monkeypatch.setattr(client, "PAUSES_S", (0.0, 0.0, 0.0))
    with running_hub() as stub:
        use_hub(stub.endpoint, tmp_path / "hf-home", monkeypatch)
        yield stub


def use_hub(endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an address the hub, and a folder the place of its cache and its login."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv(ASKED_OFFLINE, "0")
    # This process has read the variables already.
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 protocol server on loopback."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The address of an empty bucket, for this process and those it starts."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.config.conf.clear()
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**9}"
    store.mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four CPUs by name, started once for all tests that need one."""
    with ray_session(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The top of the repository."""
    return Path(__file__).resolve().parent.parent
