"""The search with few measurements. Oracle: the greatest of all values, one by one."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.expo.bracket import most_measurements, needed_values, num_measurements, peak_of


def test_the_peak_of_any_row_with_one_is_found_by_at_most_half_the_measurements() -> None:
    for count in range(2, 40):
        for reference in {0, count - 1, count // 2, count // 3}:
            at_end = reference in (0, count - 1)
            for peak in range(count):
                measured: list[int] = []

                def value(place: int, peak: int = peak, measured: list[int] = measured) -> float:
                    measured.append(place)
                    return -(place - peak) * (1.0 if place > peak else -7.0)

                assert peak_of(count, value, reference) == peak
                assert len(set(measured)) == len(measured)
                assert reference in measured
                assert len(measured) <= most_measurements(count, at_end=at_end)
                assert len(measured) <= count // 2 or count < needed_values(at_end)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=60, unique=True), st.data())
def test_what_it_returns_is_the_best_that_it_measured(
    row: list[float], data: st.DataObject
) -> None:
    reference = data.draw(st.integers(0, len(row) - 1))
    measured: dict[int, float] = {}

    def value(place: int) -> float:
        assert place not in measured
        measured[place] = row[place]
        return row[place]

    assert peak_of(len(row), value, reference) == max(measured, key=measured.__getitem__)


def test_numbers_of_measurements_are_fibonaccis() -> None:
    assert [num_measurements(n) for n in (1, 2, 3, 4, 5, 7, 8, 12, 13, 20, 21)] == [
        *(1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7)
    ]
    assert (needed_values(True), needed_values(False)) == (12, 14)
