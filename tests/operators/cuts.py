"""A search over a tensor that this process has alone, for the tests of searches."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from operators.selection import Search, Seen, Tally, TopCut, begin_search, settle


def top_cut(
    chunks: Callable[[], Iterator[tuple[int, Tensor]]], count: int, total: int, key: tuple[int, int]
) -> TopCut:
    """The cut of a tensor that this process has alone.

    Args:
        chunks: yields, each time it is called, its elements as (first global index, values).
    """
    search = begin_search(count, total)
    if isinstance(search, TopCut):
        return search

    def look(searches: Mapping[int, Search]) -> dict[int, Seen]:
        tally = Tally(searches[0], key)
        for start, x in chunks():
            tally.look(x, start)
        return {0: tally.seen()}

    return settle({0: search}, look)[0]
