"""`poise deploy`: change what a name means on a running server."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.serve.client import Client, RefusedError, read_key

KEY_VARIABLE = "POISE_DEPLOY_KEY"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the options ask for.

    Raises:
        InputError: not just one thing.
    """

    name: str | None
    path: Path | None
    canary: int | None
    promote: str | None
    rollback: str | None

    def request(self) -> tuple[str, dict[str, Any]]:
        """The route and the body of the request."""
        for option, name in (("promote", self.promote), ("rollback", self.rollback)):
            if name is None:
                continue
            others = (self.name, self.path, self.canary, self.promote, self.rollback)
            if sum(each is not None for each in others) > 1:
                raise InputError(f"--{option} {name}: allowed: alone, with --url and a key")
            return f"/admin/{option}", {"name": name}
        if self.name is None or self.path is None:
            raise InputError("NAME PATH: required, or --promote NAME, or --rollback NAME")
        body: dict[str, Any] = {"name": self.name, "path": str(self.path.expanduser().absolute())}
        return "/admin/deploy", body | ({} if self.canary is None else {"canary": self.canary})


def run_deploy(asked: Asked, url: str, *, key_file: Path | None, as_json: bool) -> bool:
    """Ask a server for a change, wait for it and print what the name means then; returns whether
    the server could.

    Raises:
        InputError: what is asked for is refused.
    """
    route, body = asked.request()
    key = read_key(key_file, KEY_VARIABLE)
    if key is None:
        raise InputError(f"{KEY_VARIABLE}: not set; allowed: there or in --key-file a server's key")
    client = Client(url, key, lambda line: print(line, file=sys.stderr, flush=True), answer_s=None)
    try:
        told = client.post(route, body).json()
    except RefusedError as error:
        if error.status is None or error.status >= 500:
            print(f"poise: {error}", file=sys.stderr)
            return False
        raise InputError(str(error)) from None
    finally:
        client.close()
    print(json.dumps(told, indent=2) if as_json else _line(told))
    return True


def _line(told: dict[str, Any]) -> str:
    """What a name means, for people."""
    canary = told["canary"]
    if canary is not None:
        return (
            f"{told['name']}: {canary['share']}% of requests {canary['weights']} "
            f"({canary['path']}), the others {told['weights']}"
        )
    before = "" if told["before"] == told["weights"] else f", was {told['before']}"
    return f"{told['name']}: {told['weights']} ({told['path']}){before}"
