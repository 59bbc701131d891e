"""Ways to run the arithmetic: eager torch and numpy, compiled C, Triton; `choice` picks one.

`counter_hash.h` has the counter hash in C, `selection.h` the look of a search. `merging.c` and
`optimizer.c` have the passes that use both; the Python module of the same name calls them.
"""

CHUNK = (
    1 << 18
)  # elements that are worked on at once: few enough for a cache, enough to hide Python
