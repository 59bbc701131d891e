"""Whether the hub may be asked.

The command line takes all libraries offline (`HF_HUB_OFFLINE`), so that they ask nobody; it keeps
what the user said in a variable of its own, which workers inherit.
"""

import os

ASKED_OFFLINE = "POISE_HF_HUB_OFFLINE"


def is_offline() -> bool:
    """Whether the user said that the hub is not to be asked (`HF_HUB_OFFLINE=1`)."""
    said = os.environ.get(ASKED_OFFLINE)
    if said is None:
        said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")
