"""The store's blocks: whole or missing, each by one process. Oracle: the samples that were written,
and processes that are really killed.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.store import BLOCK_DOCUMENTS, Cell, DamagedBlockError, Store


def cell_of(num_documents: int = 300, key: str = "k" * 32) -> Cell:
    return Cell("a task", key, num_documents, {"model": "m"})


def path_of(store: Store, cell: Cell, block: int) -> Path:
    return Path(store.place.address) / store.name(cell, block)


def samples_of(cell: Cell, block: int) -> list[Sample]:
    return [
        Sample(number, f"id {number}", "c", [["a", {"b": "ü"}]], [[-1.5, True]], {"acc": 1.0})
        for number in range(*cell.documents(block))
    ]


@given(num_documents=st.integers(1, 5 * BLOCK_DOCUMENTS))
def test_blocks_cover_the_documents_once(num_documents: int) -> None:
    cell = cell_of(num_documents)
    ranges = [range(*cell.documents(block)) for block in range(cell.num_blocks)]
    assert [number for each in ranges for number in each] == list(range(num_documents))
    assert all(len(each) == BLOCK_DOCUMENTS for each in ranges[:-1])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store, cell = Store(tmp_path / "store"), cell_of()
    store.begin()
    store.describe(cell)
    for block in (1, 0):
        store.write(cell, block, samples_of(cell, block), {"batch_size": 4})
        assert store.read(cell, block) == (samples_of(cell, block), {"batch_size": 4})
    described = path_of(store, cell, 0).with_name("cell.json")
    assert json.loads(described.read_text()) == {"model": "m"}
    again = Store(tmp_path / "store")
    before = path_of(store, cell, 1).read_bytes()
    again.write(cell, 1, samples_of(cell, 1), {"batch_size": 4})
    assert path_of(store, cell, 1).read_bytes() == before


def test_every_changed_byte_of_a_block_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A file with one changed byte never reads as other samples."""
    store, cell = Store(tmp_path / "store"), cell_of(3)
    store.write(cell, 0, samples_of(cell, 0))
    path = path_of(store, cell, 0)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        try:
            assert store.read(cell, 0) == (samples_of(cell, 0), None)
        except DamagedBlockError:
            noticed += 1
    assert noticed > len(whole) // 7 // 3
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedBlockError, match=r"00000\.parquet: "):
            store.read(cell, 0)


def test_another_cells_block_is_damage(tmp_path: Path) -> None:
    store, cell, other = Store(tmp_path / "store"), cell_of(), cell_of(key="o" * 32)
    store.write(other, 0, samples_of(other, 0))
    path_of(store, cell, 0).parent.mkdir(parents=True)
    path_of(store, other, 0).rename(path_of(store, cell, 0))
    with pytest.raises(DamagedBlockError, match="holds other documents"):
        store.read(cell, 0)


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"schema": 3}')
    with pytest.raises(InputError, match=r"store\.json: found \{'schema': 3\}; allowed: "):
        Store(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
from pipelines.evaluate.store import Cell, Store
store, cell = Store(sys.argv[1]), Cell("a task", "k" * 32, 300, {})
with store.claimed(cell, 0) as mine:
    path = Path(sys.argv[1]) / store.name(cell, 0)
    path.with_name(f".{path.name}.1.partial").write_text("half")  # as a killed write leaves it
    print(mine, flush=True)
    time.sleep(600)
"""


def test_a_block_has_one_holder_until_it_dies(tmp_path: Path, project_root: Path) -> None:
    """Another process is told, another block is free, and a death with -9 frees the block."""
    store, cell = Store(tmp_path / "store"), cell_of()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.place.address],
        cwd=project_root,
        env=os.environ | {"PYTHONPATH": str(project_root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "True\n"
        with store.claimed(cell, 0) as mine:
            assert not mine
        with store.claimed(cell, 1) as mine:
            assert mine
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with store.claimed(cell, 0) as mine:
        assert mine
        store.write(cell, 0, samples_of(cell, 0))
    with store.claimed(cell, 0) as mine:
        assert not mine
    names = {path.name for path in path_of(store, cell, 0).parent.iterdir()}
    assert names == {"00000.parquet", ".00001.lock"}
