"""A sandbox for programs that a model wrote: no network, nothing of the machine's files, limits.

`runner` is what others use. The rest runs in the sandbox and imports the standard library alone, so
that a program finds little in its memory and starts soon.
"""
