"""The command line in the tests' own process."""

import sys

import pytest

from ray_jobs import cli


def poise(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; returns the exit status."""
    monkeypatch.setattr(sys, "argv", ["poise", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
