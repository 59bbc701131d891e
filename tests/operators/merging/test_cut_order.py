"""Which of equal magnitudes stay where counter words repeat: in more than 2^32 elements.

Oracle: the order by its definition (the word, then the index's upper half), sorted by numpy.
"""

import numpy as np
import pytest
import torch

from operators.merging.cuts import tie_key
from operators.merging.method import Scope
from operators.selection import Search, TopCut
from operators.sparsify import top_mask

COUNT = 5 << 32  # never held: only some of its elements are looked at
STARTS = [(high << 32) + 7_000 * high for high in range(5)]
PLACES = torch.cat([torch.arange(start, start + 100) for start in STARTS])
SCOPE = Scope({"x": (COUNT,)}, 1, 0, {"scope": "model"})


def search_of(ties: str) -> Search:
    return Search(50, COUNT, 0, 0, by_index=ties == "index")


def test_the_upper_half_follows_the_word() -> None:
    key = (1, 2)
    order = TopCut(5, 0, high_bits=3).order(PLACES, key)
    assert torch.equal(order >> 3, TopCut(5, 0).order(PLACES, key))
    assert torch.equal(order & 7, PLACES >> 32)


@pytest.mark.parametrize("ties", ["hash", "index"])
def test_exactly_as_many_stay_as_the_order_says(ties: str) -> None:
    search, key = search_of(ties), tie_key(SCOPE, 0)
    order = search.order(PLACES.numpy(), key)
    assert order.min() >= 0
    assert order.max() < 1 << search.bits
    last = (1 << search.bits) - 1 - int(np.sort(order)[::-1][122])  # the 123rd that stays
    cut = search.cut(5, last)
    fives = torch.full((100,), 5, dtype=torch.int32).view(torch.float32)
    assert sum(int(top_mask(fives, cut, key, start).sum()) for start in STARTS) == 123


def test_a_tied_bracket_holds_the_order_it_looks_for() -> None:
    search = search_of("hash")
    settled = search._among_equals(5, 50, 100)
    assert isinstance(settled, Search)
    middle = (5 << search.bits) + (1 << search.bits) // 2
    assert 5 << search.bits <= settled.low <= middle <= settled.high < 6 << search.bits
