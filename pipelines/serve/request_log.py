"""The log of requests: one line of JSON each, in a file that is turned over when it is full."""

import json
import logging
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from pipelines.serve.config import LogConfig

FILE = "requests.jsonl"
KEPT = 5


class RequestLog:
    """Writes lines; what was asked and answered stands in them only where the config says so."""

    def __init__(self, config: LogConfig, state: Path) -> None:
        self.has_prompts = config.prompts
        file = Path(config.file) if config.file else state / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        size = int(config.max_mib * (1 << 20))
        self._handler = RotatingFileHandler(file, maxBytes=size, backupCount=KEPT, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def write(self, **fields: Any) -> None:
        """One line, with the time."""
        stamp = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stamp)) + f".{stamp % 1:.3f}"[2:]
        line = json.dumps({"time": f"{moment}Z", **fields}, ensure_ascii=False, default=str)
        record = logging.LogRecord("poise", logging.INFO, "", 0, line, None, None)
        self._handler.emit(record)
