"""Which of equal magnitudes stay where counter words repeat: in more than 2^32 elements."""

import numpy as np
import pytest
import torch

from operators.merging.cuts import CutSearch, Target, tie_key
from operators.merging.method import MergeInput, Scope
from operators.selection import Cut
from operators.sparsify import TopCut, top_mask

COUNT = 5 << 32  # never held: only some of its elements are looked at
STARTS = [(high << 32) + 7_000 * high for high in range(5)]
PLACES = torch.cat([torch.arange(start, start + 100) for start in STARTS])


def search_of(ties: str) -> CutSearch:
    scope = Scope({"x": (COUNT,)}, 1, 0, {"ties": ties, "scope": "model"})
    return CutSearch(scope, MergeInput.deltas, ())


def test_the_upper_half_follows_the_word() -> None:
    key = (1, 2)
    order = TopCut(5, 0, high_bits=3).order(PLACES, key)
    assert torch.equal(order >> 3, TopCut(5, 0).order(PLACES, key))
    assert torch.equal(order & 7, PLACES >> 32)


@pytest.mark.parametrize("ties", ["hash", "index"])
def test_exactly_as_many_stay_as_the_order_says(ties: str) -> None:
    search = search_of(ties)
    order = search._order(0, PLACES.numpy())
    assert order.min() >= 0
    assert order.max() <= search._top_order
    last = search._top_order - int(np.sort(order)[::-1][122])  # the 123rd that stays
    cut = TopCut(5, last, by_index=ties == "index", high_bits=search._high_bits)
    fives = torch.full((100,), 5, dtype=torch.int32).view(torch.float32)
    key = tie_key(search.scope, 0)
    assert sum(int(top_mask(fives, cut, key, start).sum()) for start in STARTS) == 123


def test_a_tied_bracket_holds_the_order_it_looks_for() -> None:
    search = search_of("hash")
    settled = search._settle(Target(0, 50), Cut(5, 0, 100))
    assert settled.search is not None
    middle = search._top_order // 2
    assert settled.search.low <= middle <= settled.search.high <= search._top_order
