"""The Flask applications: one for questions, one for the event streams."""

import threading
from pathlib import Path

from flask import Flask

from persona.codec import MAX_BODY
from persona_broker import problems
from persona_broker.api import current, decisions, documents, events, health, reports
from persona_broker.host.load import LoadSource, MachineSource, SetSource
from persona_broker.settings import Settings
from persona_broker.state import State
from persona_broker.store.sqlite import Store
from persona_broker.watcher import Watcher
from persona_broker.workers import at_exit


def api(settings: Settings) -> Flask:
    """Decisions, sessions, documents, health.  Call it in the process that will serve it."""
    app = _base(settings)
    for blueprint in (
        decisions.blueprint,
        current.blueprint,
        reports.blueprint,
        documents.blueprint,
        health.blueprint,
    ):
        app.register_blueprint(blueprint)
    return app


def streams(settings: Settings) -> Flask:
    """The event streams, and the watcher that feeds them (with a connection to the record of its own)."""
    app = _base(settings)
    store = Store(Path(settings.db))
    source: LoadSource = MachineSource() if settings.load_source == "psutil" else SetSource(store.set_load)
    watcher = Watcher(store, source, settings.load_max_age_s, settings.health_max_age_s)
    watcher.look()  # the first sample before the first answer: until then no load is known
    threading.Thread(target=watcher.run, name="watcher", daemon=True).start()
    app.extensions["streams"] = events.Streams(watcher, app.extensions["state"])
    at_exit(app.extensions["streams"].end)
    app.register_blueprint(events.blueprint)
    app.register_blueprint(health.blueprint)
    return app


def _base(settings: Settings) -> Flask:
    app = Flask("persona_broker", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.extensions["state"] = State(Store(Path(settings.db)), settings.load_max_age_s, settings.health_max_age_s)
    app.extensions["store"] = Store(Path(settings.db))
    problems.register(app)
    return app
