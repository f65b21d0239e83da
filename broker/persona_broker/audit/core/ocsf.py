"""Records as events of the Open Cybersecurity Schema Framework (https://schema.ocsf.io/1.1.0), where it has a class.

Only what is known is filled in.  A program start is Process Activity (1007), a login Authentication (3002).
"""

from collections.abc import Mapping
from typing import Any

from persona.shown import words
from persona.version import VERSION

SCHEMA = "1.1.0"
_LAUNCH, _TERMINATE = 1, 2
_LOGON, _LOGOFF = 1, 2
# By event of a record: class and activity.
CLASSES: Mapping[str, tuple[int, int]] = {
    "exec": (1007, _LAUNCH),
    "stopped": (1007, _LAUNCH),
    "killed": (1007, _TERMINATE),
    "admission": (3002, _LOGON),
    "break_glass": (3002, _LOGON),
    "session_end": (3002, _LOGOFF),
}
_NAMES = {1007: ("Process Activity", "System Activity"), 3002: ("Authentication", "Identity & Access Management")}
_ALLOWED, _DENIED = 1, 2  # action_id, of the profile security_control
_SUCCESS, _FAILURE = 1, 2
_INFORMATIONAL, _LOW = 1, 2
_VIRTUAL_MACHINE = 6  # type_id of a device
_REGULAR_FILE = 1


def event_of(number: int, at_us: int, vm: str | None, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The event, or ``None`` where the schema has no class for it, or the person's part was erased."""
    kind = CLASSES.get(str(record.get("event")))
    if kind is None or vm is None or "user" not in record:
        return None
    class_uid, activity_id = kind
    denied = record.get("decision") == "denied"
    stopped = denied and record.get("complain") is not True
    class_name, category_name = _NAMES[class_uid]
    at = record.get("at")
    user = {"name": record["user"]}
    session = {"uid": record.get("session")}
    found: dict[str, Any] = {
        "class_uid": class_uid,
        "class_name": class_name,
        "category_uid": class_uid // 1000,
        "category_name": category_name,
        "activity_id": activity_id,
        "type_uid": class_uid * 100 + activity_id,
        "time": int(at * 1000) if isinstance(at, int | float) else at_us // 1000,
        "severity_id": _LOW if denied else _INFORMATIONAL,
        "status_id": _FAILURE if stopped else _SUCCESS,
        "action_id": _DENIED if stopped else _ALLOWED,
        "metadata": {
            "version": SCHEMA,
            "profiles": ["security_control"],
            "product": {"name": "Persona", "vendor_name": "Persona", "version": VERSION},
            "uid": str(number),
            "logged_time": at_us // 1000,
        },
        "actor": {"user": user, "session": session},
        "device": {"hostname": vm, "type_id": _VIRTUAL_MACHINE},
        "unmapped": {
            name: record[name]
            for name in ("event", "persona", "persona_version", "policy", "leased", "complain")
            if record.get(name) is not None
        },
    }
    if record.get("reason"):
        found["status_detail"] = record["reason"]
    if class_uid == 1007:
        path = str(record.get("program") or "")
        file = {"name": path.rpartition("/")[2] or path, "path": path, "type_id": _REGULAR_FILE}
        argv = record.get("argv")
        line = words(map(str, argv)) if isinstance(argv, list) else ""
        found["process"] = {"file": file, "cmd_line": line, "user": user}
    else:
        found |= {"user": user, "session": session, "dst_endpoint": {"hostname": vm}}
    return found
