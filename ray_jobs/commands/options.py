"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipelines.errors import InputError


def no_address(out: Path | None) -> Path | None:
    """Raise InputError for an address, which would be taken for the name of a folder here."""
    from pipelines.storage import is_address

    if out is not None and is_address(out):
        raise InputError(
            f"--out: found the address {out}; allowed: a folder (`poise merge` and "
            "`poise evaluate` alone write to addresses)"
        )
    return out


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file; see configs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override fields of the config")
]
Out = Annotated[Path, typer.Option("--out", callback=no_address, help="where the result goes")]
Force = Annotated[
    bool, typer.Option("--force", help="replace an existing result when the new one is complete")
]
Plan = Annotated[bool, typer.Option("--plan", help="only show the plan and its cost")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Address = Annotated[
    str | None, typer.Argument(metavar="[ADDRESS]", help="of the head, as http://HOST:8265")
]
AFTER_DASHES = "poise.after_dashes"


class CommandAfterDashes(TyperCommand):
    """A command that leaves what follows `--` as it is, in `context.meta[AFTER_DASHES]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what stands before `--`."""
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[AFTER_DASHES] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])
