"""`poise methods`: the merge methods with their parameters."""

import json
from dataclasses import asdict

from rich.table import Table

from operators.merging import METHODS, Method
from pipelines.errors import InputError
from ray_jobs.tables import print_table


def run_methods(name: str | None, *, as_json: bool) -> None:
    """Print all methods with their summaries, or one method with its parameters.

    Raises:
        InputError: an unknown method.
    """
    if name is not None and name not in METHODS:
        raise InputError(f"method: found {name!r}; allowed: {', '.join(METHODS)}")
    chosen = METHODS if name is None else {name: METHODS[name]}
    if as_json:
        print(json.dumps({key: _described(method) for key, method in chosen.items()}, indent=2))
    elif name is None:
        table = Table("method", "what it does", "parameters", title="merge methods")
        for key, method in METHODS.items():
            table.add_row(key, method.summary, ", ".join(method.parameters))
        print_table(table)
    else:
        _print_one(name, METHODS[name])


def _described(method: Method) -> dict[str, object]:
    """One method as values for JSON."""
    parameters = {}
    for name, parameter in method.parameters.items():
        entry = asdict(parameter)
        entry = {key: entry[key] for key in ("meaning", "default", "per_model")}
        parameters[name] = {**entry, "allowed": parameter.allowed}
    return {
        "summary": method.summary,
        "needs_base": method.needs_base,
        "num_models": method.num_models,
        "parameters": parameters,
    }


def _print_one(name: str, method: Method) -> None:
    """One method's parameters as a table."""
    fewest, most = method.num_models
    models = f"{fewest} or more models" if most is None else f"{fewest} to {most} models"
    if fewest == most:
        models = f"{fewest} model" + "s" * (fewest != 1)
    base = "with a base model" if method.needs_base else "without a base model"
    if method.needs_base is None:
        base = "with a base model or without"
    elif isinstance(method.needs_base, str):
        base = f"with a base model if {method.needs_base} is given"
    table = Table("parameter", "default", "allowed", "of each model", "meaning", title=name)
    for key, parameter in method.parameters.items():
        each = "yes" if parameter.per_model else ""
        table.add_row(key, str(parameter.default), parameter.allowed, each, parameter.meaning)
    print(f"{method.summary}; {models}, {base}")
    print_table(table)
