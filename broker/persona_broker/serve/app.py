"""The Flask applications: one for questions, one for the event streams."""

import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from flask import Blueprint, Flask, Response

from persona import wire
from persona.codec import MAX_BODY
from persona_broker import problems
from persona_broker.api import current, decisions, documents, events, health, monitoring, records
from persona_broker.api.guests import Asked
from persona_broker.audit.chain import Chain
from persona_broker.audit.denials import denials
from persona_broker.audit.files import beside
from persona_broker.condition_watcher import Watcher
from persona_broker.host.load import LoadSource, MachineSource, SetSource
from persona_broker.host.sample_files import SampleFiles
from persona_broker.serve.worker import at_exit
from persona_broker.settings import Settings, hosts_of, watched_hosts
from persona_broker.spread import Newest
from persona_broker.store.database import Access
from persona_broker.store.sqlite import SqliteStore
from persona_broker.view import State

API = (
    decisions.blueprint,
    current.blueprint,
    health.blueprint,
    documents.blueprint,
    records.blueprint,
    monitoring.blueprint,
)
STREAMS = (events.blueprint, monitoring.blueprint)

_BEHIND_MAX = 20_000  # records that an answer to who scrapes may read without an index: some tenths of a second


def api(settings: Settings) -> Flask:
    """Decisions, sessions, documents, health.  Call it in the process that will serve it."""
    return base(settings, API)


def streams(settings: Settings) -> Flask:
    """The event streams, and the watcher that feeds them (with a connection to the database of its own)."""
    app = base(settings, STREAMS)
    store = SqliteStore(Path(settings.db))
    source: LoadSource = MachineSource() if settings.load_source == "psutil" else SetSource(store.set_load)
    hosts = SampleFiles(Path(settings.host.directory), hosts_of(settings.host))
    watcher = Watcher(store, source, settings.load_max_age_s, settings.health_max_age_s, hosts)
    watcher.look()  # the first sample before the first answer: until then no load is known
    threading.Thread(target=watcher.run, name="watcher", daemon=True).start()
    app.extensions["streams"] = events.Streams(watcher, app.extensions["state"])
    at_exit(app.extensions["streams"].end)
    return app


def base(settings: Settings, blueprints: Iterable[Blueprint]) -> Flask:
    """These routes over the database; the streams need more to be served."""
    app = Flask("persona_broker", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    ages = settings.load_max_age_s, settings.health_max_age_s
    app.extensions["state"] = State(SqliteStore(Path(settings.db)), *ages, watched_hosts(settings.host))
    app.extensions["asked"] = Asked()
    app.extensions["store"] = SqliteStore(Path(settings.db))
    chain = Chain(beside(Path(settings.db)))
    app.extensions["keeper"] = records.Keeper(chain, settings.audit.when_full)
    counted = partial(denials, chain, behind_max=_BEHIND_MAX)
    app.extensions["spread"] = Newest(SqliteStore(Path(settings.db), Access.READ), counted)
    problems.register(app)
    app.after_request(_name_version)
    for blueprint in blueprints:
        app.register_blueprint(blueprint)
    return app


def _name_version(response: Response) -> Response:
    """Every answer says which version of the protocol this broker speaks, errors too."""
    response.headers[wire.HEADER] = str(wire.CURRENT)
    return response
