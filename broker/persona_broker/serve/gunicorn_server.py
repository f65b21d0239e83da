"""gunicorn around the two applications, each in a process tree of its own."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication

from persona_broker import metrics
from persona_broker.api.events import STREAMS_MAX

API_THREADS = 32
STREAM_THREADS = STREAMS_MAX + 20  # and some for health checks, and for clients that dawdle
KEEPALIVE_S = 300  # guests keep one connection
CONNECTIONS_MAX = 2000  # of one worker, idle ones included


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen, ``host:port`` or ``unix:/path``, and with which certificate."""

    bind: str
    certificate: Path | None
    key: Path | None


class _Server(BaseApplication):
    def __init__(self, load: Callable[[], Flask], options: dict[str, Any]) -> None:
        self._load_app = load
        self._options = options
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)
        # gunicorn 25.1 and later would make a socket in the home directory by which workers can be taken away
        if "control_socket_disable" in self.cfg.settings:
            self.cfg.set("control_socket_disable", True)

    def load(self) -> Any:
        return self._load_app()


def _options(endpoint: Endpoint, *, workers: int, threads: int, rows: range) -> dict[str, Any]:
    def assign_row(arbiter: Any, worker: Any) -> None:
        taken = {other.metrics_row for other in arbiter.WORKERS.values()}
        worker.metrics_row = next((row for row in rows if row not in taken), rows[-1])

    def use_row(_arbiter: Any, worker: Any) -> None:
        metrics.use_row(worker.metrics_row)

    options: dict[str, Any] = {
        "bind": endpoint.bind,
        "workers": workers,
        "threads": threads,
        "worker_class": "persona_broker.serve.worker.BoundedWorker",
        "worker_connections": CONNECTIONS_MAX,
        "keepalive": KEEPALIVE_S,
        "timeout": 30,
        "graceful_timeout": 1,
        "limit_request_line": 2048,
        "limit_request_fields": 32,
        "limit_request_field_size": 4096,
        "loglevel": "warning",
        "umask": 0o077,
        "proc_name": "persona-broker",
        "pre_fork": assign_row,
        "post_fork": use_row,
    }
    if endpoint.certificate is not None:
        options |= {"certfile": str(endpoint.certificate), "keyfile": str(endpoint.key)}
        options["ssl_version"] = ssl.PROTOCOL_TLS_SERVER
    return options


def serve_api(load: Callable[[], Flask], endpoint: Endpoint, workers: int) -> None:
    """Questions; does not return."""
    _Server(load, _options(endpoint, workers=workers, threads=API_THREADS, rows=metrics.API_ROWS)).run()


def serve_streams(load: Callable[[], Flask], endpoint: Endpoint) -> None:
    """Event streams: one worker, so that there is one watcher; does not return."""
    _Server(load, _options(endpoint, workers=1, threads=STREAM_THREADS, rows=metrics.EVENTS_ROWS)).run()
