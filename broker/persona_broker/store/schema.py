"""The tables of the database, as numbered migrations: number N brings a database of version N - 1 to version N.

The version is SQLite's ``PRAGMA user_version``.  Version 0.1.0 of the broker did not set it, so a database without one
may have its tables already: the first two migrations make only what is not there.  A migration is never changed once
it was released; what is new is a new one at the end.  A broker of 0.1.0 goes on with a database of any version here,
since it looks at none of what was added, while no document is applied that it does not know.
"""

import sqlite3

from persona_broker.store.interface import StoreError

# One field of a record, as the indexes have it; of a text that is no JSON there is none.
RECORD_FIELD = "CASE WHEN json_valid(body) THEN json_extract(body, '$.{}') END"

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (  # 1: what 0.1.0 has
        "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS documents (kind TEXT, name TEXT, version INTEGER, digest TEXT NOT NULL,"
        " body TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (kind, name, version)) WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS applied (position INTEGER PRIMARY KEY, kind TEXT, name TEXT, version INTEGER)",
        "CREATE TABLE IF NOT EXISTS guests (name TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE) WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, guest TEXT NOT NULL, user TEXT NOT NULL,"
        " groups TEXT NOT NULL, service TEXT NOT NULL, remote TEXT NOT NULL, opened_at REAL NOT NULL,"
        " revoked INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS records"
        " (id INTEGER PRIMARY KEY AUTOINCREMENT, guest TEXT NOT NULL, body TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS health (seq INTEGER PRIMARY KEY AUTOINCREMENT, guest TEXT NOT NULL UNIQUE,"
        " at REAL NOT NULL, report TEXT NOT NULL, past TEXT NOT NULL)",
        "INSERT OR IGNORE INTO meta VALUES ('generation', '1'), ('records_lost', '0')",
    ),
    (  # 2: command sets, sessions that are to end, and records found by guest, user and denial
        "CREATE TABLE IF NOT EXISTS expansions (kind TEXT, name TEXT, version INTEGER, body TEXT NOT NULL,"
        " PRIMARY KEY (kind, name, version)) WITHOUT ROWID",
        "CREATE TABLE IF NOT EXISTS ending (id TEXT PRIMARY KEY) WITHOUT ROWID",
        "CREATE TRIGGER IF NOT EXISTS session_over AFTER DELETE ON sessions"
        " BEGIN DELETE FROM ending WHERE id = OLD.id; END",
        "CREATE INDEX IF NOT EXISTS records_guest ON records (guest)",
        f"CREATE INDEX IF NOT EXISTS records_user ON records ({RECORD_FIELD.format('user')})",
        f"CREATE INDEX IF NOT EXISTS records_denied ON records ({RECORD_FIELD.format('reason')})"
        f" WHERE {RECORD_FIELD.format('decision')} = 'denied'",
    ),
    # 3: change-sets; what is applied already is the first.  ``policies``: their names in order, NULL = as one before
    (
        "CREATE TABLE change_sets (revision INTEGER PRIMARY KEY, at REAL NOT NULL, author TEXT NOT NULL,"
        " message TEXT NOT NULL, policies TEXT)",
        "CREATE TABLE change_items (revision INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,"
        " before INTEGER, after INTEGER, PRIMARY KEY (kind, name, revision)) WITHOUT ROWID",
        "CREATE INDEX change_items_revision ON change_items (revision)",
        "CREATE INDEX change_items_name ON change_items (name)",
        "INSERT INTO change_sets SELECT 1, (julianday('now') - 2440587.5) * 86400, '',"
        " 'what was applied before there were revisions',"
        " (SELECT json_group_array(name) FROM (SELECT name FROM applied WHERE kind = 'Policy' ORDER BY position))"
        " WHERE EXISTS (SELECT 1 FROM applied)",
        "INSERT INTO change_items SELECT 1, kind, name, NULL, version FROM applied",
    ),
    (  # 4: where documents are written, as of a revision; a file without a name = nobody knows; how often they moved
        "CREATE TABLE origins (kind TEXT NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, file TEXT NOT NULL,"
        " line INTEGER NOT NULL, PRIMARY KEY (kind, name, revision)) WITHOUT ROWID",
        "INSERT INTO meta VALUES ('moved', '0')",
        # the generation that guests learn of a change-set by; what each guest was told, and said that it knows
        "ALTER TABLE change_sets ADD COLUMN generation INTEGER",
        "CREATE TABLE seen (guest TEXT PRIMARY KEY, told INTEGER NOT NULL DEFAULT 0, told_at REAL,"
        " asked INTEGER NOT NULL DEFAULT 0, asked_at REAL) WITHOUT ROWID",
        # which database a backup is of; guests that a restore denies everything; versions that it may have lost
        "INSERT INTO meta VALUES ('site', '\"' || lower(hex(randomblob(16))) || '\"')",
        "CREATE TABLE quarantine (guest TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
        "CREATE TRIGGER guest_over AFTER DELETE ON guests BEGIN DELETE FROM seen WHERE guest = OLD.name;"
        " DELETE FROM quarantine WHERE guest = OLD.name; END",
    ),
    (  # 5: records go to the audit's chain; what waits for it, its checkpoints, and what is held in it
        "CREATE TABLE audit_pending (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL)",
        "CREATE TABLE audit_checkpoints (chain TEXT NOT NULL, number INTEGER NOT NULL, at_us INTEGER NOT NULL,"
        " pruned_from INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (chain, number, at_us)) WITHOUT ROWID",
        "CREATE TABLE audit_holds (kind TEXT NOT NULL, name TEXT NOT NULL, at REAL NOT NULL, author TEXT NOT NULL,"
        " message TEXT NOT NULL, PRIMARY KEY (kind, name)) WITHOUT ROWID",
    ),
    # 6: the newest sample of each host, and which domain each guest is; the newest generation that concerns it alone
    (
        "CREATE TABLE hosts (seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, at REAL NOT NULL,"
        " sample TEXT NOT NULL, latches TEXT NOT NULL)",
        "CREATE TABLE bindings (guest TEXT PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, generation INTEGER NOT NULL"
        " DEFAULT 0) WITHOUT ROWID",
        "CREATE TRIGGER guest_unbound AFTER DELETE ON guests BEGIN DELETE FROM bindings WHERE guest = OLD.name; END",
    ),
)


class SqliteError(StoreError, sqlite3.DatabaseError):
    """What SQLite says, as callers of any store expect it."""


class NewerSchemaError(SqliteError):
    """The database is of a version that this broker does not know."""


class OlderSchemaError(SqliteError):
    """The database is of an older version, and whoever opened it only reads."""


class NoSchemaError(SqliteError):
    """The database has tables of a version that it does not name."""


_FIX = "'persona-broker migrate' brings it there, as a start of the service does"
# What only a version from this one on has: SQLite's .dump keeps tables, and not the version.
_FIRST_OF = ((6, "bindings"), (5, "audit_pending"), (4, "origins"), (3, "change_sets"))


def check(db: sqlite3.Connection) -> None:
    """For who only reads.  Raises ``OlderSchemaError``, ``NewerSchemaError``, ``NoSchemaError``, ``sqlite3.Error``."""
    if (found := version_of(db)) < len(MIGRATIONS):
        raise OlderSchemaError(
            f"{_file(db)} has schema version {found}, and this persona-broker wants {len(MIGRATIONS)}; {_FIX}"
        )


def migrate(db: sqlite3.Connection) -> None:
    """Brings the database to the newest version, in one transaction: where it fails, everything is as it was.

    ``db`` is in autocommit mode.  Raises ``NewerSchemaError``, ``NoSchemaError``, ``sqlite3.Error``.
    """
    if version_of(db) == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        for migration in MIGRATIONS[version_of(db) :]:  # another process may have been faster
            for statement in migration:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    except BaseException:
        if db.in_transaction:  # with a full disk, SQLite has rolled it back itself
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def version_of(db: sqlite3.Connection) -> int:
    """The schema version.  Raises rather than returning one that is not known, or that the tables contradict."""
    db.execute("SAVEPOINT look")  # both of one moment: somebody else may be making the tables
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    finally:
        db.execute("RELEASE look")
    if not 0 <= version <= len(MIGRATIONS):
        raise NewerSchemaError(
            f"{_file(db)} has schema version {version}, and this persona-broker knows {len(MIGRATIONS)} at most: it was"
            " written by a newer one; install that version again, or restore a backup that this one made"
        )
    if version == 0 and (found := next((number for number, table in _FIRST_OF if table in tables), 0)):
        raise NoSchemaError(
            f"{_file(db)} has the tables of schema version {found} and no version, as what sqlite3's .dump writes;"
            f" where it is all of it, 'sqlite3 FILE \"PRAGMA user_version = {found}\"' says so"
            " ('persona-broker backup' keeps the version)"
        )
    return version


def _file(db: sqlite3.Connection) -> str:
    return str(db.execute("PRAGMA database_list").fetchone()[2])
