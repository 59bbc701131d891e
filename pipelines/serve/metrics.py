"""Metrics in the text form of Prometheus: what the gateway counts, and what replicas report."""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.serve.fleet import Report
from pipelines.serve.names import Names

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one gateway."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        by_answer = ["route", "model", "weights", "status"]
        self.requests = Counter("poise_requests", "Requests that ended", by_answer, **own)
        self.seconds = Histogram(
            "poise_request_seconds",
            "From a request's arrival to the end of its answer",
            ["route", "model", "weights"],
            buckets=_SECONDS,
            **own,
        )
        of_model = ["model", "weights"]
        self.tokens_in = Counter("poise_prompt_tokens", "Tokens of prompts", of_model, **own)
        self.tokens_out = Counter("poise_answer_tokens", "Tokens of answers", of_model, **own)
        self.retries = Counter("poise_retries", "Requests sent anew, as an engine died", **own)
        self.inside = Gauge("poise_requests_inside", "Requests in the server", ["model"], **own)
        self.names = Gauge("poise_model", "1: what a name means", ["model", "weights"], **own)
        engine = ["group", "replica"]
        self._resident = Gauge(
            "poise_resident", "1: the weights in an engine", [*engine, "weights"], **own
        )
        self._engines = {
            name: Gauge(f"poise_engine_{name}", text, engine, **own)
            for name, text in (
                ("running", "Requests that an engine works on"),
                ("waiting", "Requests that wait for an engine's weights"),
                ("swaps", "Changes of an engine's weights"),
                ("swap_s", "Seconds that changes of weights took"),
                ("answered", "Requests that an engine has answered"),
                ("cancelled", "Requests that were dropped before their answers were whole"),
                ("longest_wait_s", "The longest wait for an engine, in seconds"),
            )
        }

    def text(self, names: Names, inside: dict[str, int], reports: Iterable[Report]) -> bytes:
        """All metrics now."""
        for gauge in (self.names, self._resident, *self._engines.values()):
            gauge.clear()
        for name in names:
            self.names.labels(name, names.resolve(name).weights).set(1)
            self.inside.labels(name).set(inside.get(name, 0))
        for report in reports:
            place = (report.group, report.replica)
            self._resident.labels(*place, report.version.weights).set(1)
            for name, engine in self._engines.items():
                engine.labels(*place).set(getattr(report, name))
        return generate_latest(self._registry)
