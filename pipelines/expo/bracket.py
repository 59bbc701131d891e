"""The best of values in a row with one peak, by few measurements (Kiefer 1953: Fibonacci search).

Of F(k+2) - 1 places, k measurements find the peak, where F is Fibonacci's sequence 1, 1, 2, 3, ...:
each measurement beyond the first leaves out the places on the far side of the lower of two.
"""

from collections.abc import Callable


def num_measurements(count: int) -> int:
    """How many measurements find the peak among so many places."""
    first, second, found = 1, 2, 0  # F(2), F(3)
    while first - 1 < count:
        first, second, found = second, first + second, found + 1
    return found


def most_measurements(count: int, *, at_end: bool) -> int:
    """The most measurements of `peak_of`, with the reference's."""
    return num_measurements(count - at_end) + 1


def needed_values(at_end: bool) -> int:
    """The fewest values from which on at most half of them are measured.

    Args:
        at_end: the reference, which is always measured, is the first or the last one.
    """
    count = 1
    for number in range(2, 40):  # from 40 on, 2 num_measurements + 2 is far below
        if 2 * most_measurements(number, at_end=at_end) > number:
            count = number + 1
    return count


def peak_of(count: int, value: Callable[[int], float], reference: int) -> int:
    """The place of the peak among 0 to count - 1.

    Args:
        value: measures a place; called once for each that is measured. Rises up to the peak and
            falls after it; else some rise is found, perhaps not the highest.
        reference: a place that is always measured.

    Returns:
        the measured place with the greatest value, the first one of equals.
    """
    known: dict[int, float] = {reference: value(reference)}
    start, stop = 0, count
    if reference == 0:
        start = 1
    elif reference == count - 1:
        stop = count - 1

    def at(place: int) -> float:
        if place >= stop:
            return -float("inf")  # beyond the end, so that the number of places is Fibonacci's
        if place not in known:
            known[place] = value(place)
        return known[place]

    lengths = [1, 2]  # F(2), F(3), ...
    while lengths[-1] - 1 < stop - start:
        lengths.append(lengths[-1] + lengths[-2])
    low = start - 1  # the peak is among low + 1 ... low + lengths[-1] - 1
    while len(lengths) > 2:
        left, right = low + lengths[-3], low + lengths[-2]
        if at(right) > at(left):
            low = left
        lengths.pop()
    at(low + 1)
    return min(known, key=lambda place: (-known[place], place))
