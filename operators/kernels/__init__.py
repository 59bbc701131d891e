"""Ways to run the arithmetic: eager torch and numpy, compiled C, Triton; `choice` picks one.

`counter_hash.h` and `selection.h` are the counter hash and the look of a search in C; `merging.c`
and `optimizer.c` are the passes that use them, each with the Python module of its name.
"""

CHUNK = (
    1 << 18
)  # elements that are worked on at once: few enough for a cache, enough to hide Python
