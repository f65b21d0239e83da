"""What the broker itself puts on the record, beside what guests tell: a literal list.

Each is a record without a guest.  Its facts are ``event``, ``at`` (Unix seconds), mostly ``author`` (who gave the
command, as the machine knows them) and what stands here; a person's name other than the author's, and free text, are in
its person's part.
"""

from collections.abc import Mapping
from typing import Any

from persona_broker.audit.core.format import Entry, to_json

# By event: what it says, for docs/audit.md.
EVENTS: Mapping[str, str] = {
    "segment_opened": "A day's file begins: `segment`, `chain`, `previous`, `carried` (digest of the streams).",
    "segment_sealed": "A day's file ends: `next` is the file that goes on.",
    "change_set": "An apply or a rollback: `revision`, `message`, `count`, `documents` (the first 100).",
    "session_revoked": "An operator revoked a session: `session`, `vm`, `end` (what runs in it ends as well), `user`.",
    "guest_added": "A guest was registered, or got another token: `vm`, `renewed`.",
    "guest_removed": "A guest was removed: `vm`.",
    "guest_bound": "A guest was bound to a domain, whose host's load is its own from then on: `vm`, `uuid`.",
    "guest_unbound": "A guest is bound to no domain any more: `vm`, `uuid`.",
    "guest_readmitted": "A guest's quarantine ended: `vm`.",
    "database_restored": (
        "The database went back to a backup: `backup_at`, `backup_revision`, `revision`, `lost` (it was gone), `gone`"
        " and `quarantined` (guests), `message`."
    ),
    "load_set": "The settable load was set: `load`.",
    "records_lost": "A guest says that it lost records, without saying which: `vm`, `count`.",
    "records_refused": "Records of a guest that were none, of a version that takes no answer: `vm`, `count`, `detail`.",
    "records_dropped": "The audit could not be written and `audit.when_full` is `drop`: `vm`, `count`.",
    "audit_pruned": "Old days were deleted: `before`, and for each its `segment`, `first`, `last` and the last `hash`.",
    "audit_held": "Records of a user or session are not to be pruned or erased: `kind`, and the name.",
    "audit_released": "They may be again: `kind`, and the name.",
    "audit_erased": "A person's text was erased: `count`, `segments`.",
    "audit_loss_acknowledged": (
        "An operator said that an earlier chain is gone: `lost_chain`, `through` and `hash` (of its last checkpoint),"
        " `key`, `signature`, `message`."
    ),
    "audit_key_made": "A key for checkpoints was made: `key`, its id.",
    "sink_set_back": (
        "The chain was put back to an earlier state, and a sink goes on where it had last been the same: `sink`, `from`"
        " (the number that had arrived) and `to`."
    ),
    "broker_started": "The broker began to serve: `version`.",
    "broker_stopped": "The broker ends, as it was told to.",
}
_OF_A_PERSON = ("user", "message", "detail", "name")


def event(name: str, at: float, /, **members: Any) -> Entry:
    """One of ``EVENTS`` as it is kept.  Raises ``KeyError`` for any other."""
    EVENTS[name]
    facts = {"event": name, "at": at, **{key: members[key] for key in members if key not in _OF_A_PERSON}}
    return Entry(to_json(facts), to_json({key: members[key] for key in members if key in _OF_A_PERSON}))
