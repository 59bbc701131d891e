"""Servers and talks: `serve`, `deploy`, `chat`."""

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.commands.options import AsJson

app = typer.Typer()


@app.command(epilog="Example: `poise serve serve.yaml`, `poise serve runs/demo/models/linear`")
def serve(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|MODEL... [KEY=VALUE]...",
            help="a YAML file; or checkpoints, also on the hub; then fields of the config",
        ),
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 8000,
) -> None:
    """Serve answers and rewards over HTTP (OpenAI's API), each signed by its weights."""
    from ray_jobs.serve import run_serve

    paths = [Path(word) for word in words if "=" not in word]
    run_serve(paths, [word for word in words if "=" in word], host=host, port=port)


@app.command(
    epilog="Example: `poise deploy linear runs/ties --url http://127.0.0.1:8000 --canary 10`"
)
def deploy(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="of a served model")] = None,
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="the checkpoint that it is to mean")
    ] = None,
    url: Annotated[
        str, typer.Option(help="of the server, as http://HOST:PORT")
    ] = "http://127.0.0.1:8000",
    canary: Annotated[
        int | None, typer.Option(help="percent of the requests; all", min=1, max=99)
    ] = None,
    promote: Annotated[
        str | None, typer.Option(metavar="NAME", help="let it mean its canary")
    ] = None,
    rollback: Annotated[
        str | None, typer.Option(metavar="NAME", help="end its canary, or its last change")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="with the server's key; default POISE_DEPLOY_KEY")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change what a name means on a running server, which goes on answering."""
    from ray_jobs.deploy import Asked, run_deploy

    asked = Asked(name, path, canary, promote, rollback)
    if not run_deploy(asked, url, key_file=key_file, as_json=as_json):
        raise typer.Exit(1)


@app.command(epilog="Example: `echo 'reverse a b c' | poise chat runs/demo/models/linear`")
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="a checkpoint, or a name on the hub or the server"),
    ],
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="show the answers of another, too")
    ] = None,
    url: Annotated[str | None, typer.Option(help="of a server, as http://HOST:PORT")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="with the server's key; default POISE_API_KEY")
    ] = None,
    conversation: Annotated[
        bool, typer.Option("--conversation", help="a line follows on those before it")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="of an answer; default 256, or the server's own", min=1)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model in the terminal, here or on a server, or to two side by side."""
    from ray_jobs.chat import run_chat

    if not run_chat(
        [model] if compare is None else [model, compare],
        url=url,
        key_file=key_file,
        conversation=conversation,
        max_tokens=max_tokens,
        as_json=as_json,
    ):
        raise typer.Exit(1)
