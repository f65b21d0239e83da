"""Documents in their canonical form: what is stored, sent and compared, and the digest that tells versions apart."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from persona.documents import CommandSet, DiskIo, Document, Persona, ResourceLimits
from persona.health import vm_health_mapping


def to_mapping(document: Document) -> dict[str, Any]:
    """The canonical form: every field that says something, in the units that the parser reads back.

    Of a persona that uses command sets it has what they stand for, and not the sets.
    """
    if isinstance(document, Persona):
        return _drop_empty(
            {
                "kind": "Persona",
                "name": document.name,
                "description": document.description,
                "command_whitelist": [pattern.text for pattern in document.command_whitelist.patterns],
                "resource_limits": _limits(document.resource_limits),
                "network_access": [str(rule) for rule in document.network_access],
                "dependencies": [str(dependency) for dependency in document.dependencies],
                "priority": document.priority,
                "on_revoke": document.on_revoke,
                "home_programs": [str(pattern) for pattern in document.home_programs],
            },
            keep=("command_whitelist", "priority"),
        )
    if isinstance(document, CommandSet):
        return _drop_empty(
            {
                "kind": "CommandSet",
                "name": document.name,
                "description": document.description,
                "commands": [pattern.text for pattern in document.commands.patterns],
            }
        )
    load = {t.metric: {"below": t.below, "again_below": t.again_below} for t in document.when.host_load}
    hours = document.when.hours.text if document.when.hours else None
    health = vm_health_mapping(document.when.vm_health) if document.when.vm_health else None
    return _drop_empty(
        {
            "kind": "Policy",
            "name": document.name,
            "description": document.description,
            "subjects": _drop_empty({"users": list(document.users), "groups": list(document.groups)}),
            "commands": [pattern.text for pattern in document.commands.patterns],
            "vms": list(document.vms),
            "when": _drop_empty({"host_load": load, "vm_health": health, "hours": hours}),
            "persona": document.persona,
            "order": document.order,
        },
        keep=("commands", "vms"),
    )


def as_written(document: Document) -> dict[str, Any]:
    """The document's fields as its author wrote them: a persona with the command sets that it uses, by name."""
    mapping = to_mapping(document)
    if isinstance(document, Persona) and document.expansion is not None:
        mapping["command_whitelist"] = list(document.expansion.written)
    return mapping


def _limits(limits: ResourceLimits) -> dict[str, Any]:
    disk = limits.disk_io
    return _drop_empty(
        {
            "cpu": f"{limits.cpu_percent:g}%" if limits.cpu_percent is not None else None,
            "memory": limits.memory_bytes,
            "disk_io": _drop_empty({name: getattr(disk, name) for name in DiskIo.__dataclass_fields__}),
            "pids": limits.pids,
            "per": limits.per if limits.per != "session" else None,
        }
    )


def _drop_empty(mapping: dict[str, Any], keep: tuple[str, ...] = ()) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key in keep or value not in (None, "", [], {})}


def digest(document: Document) -> str:
    """SHA-256 of the canonical form: equal digests, equal versions.  What a persona has from which set counts too."""
    expansion = document.expansion if isinstance(document, Persona) else None
    return digest_of(to_mapping(document), None if expansion is None else (expansion.written, expansion.origins))


def digest_of(mapping: Mapping[str, Any], expansion: Sequence[Sequence[str]] | None) -> str:
    """The same of a document's canonical form, and what it has written and from which sets, as they were stored.

    It does not depend on how a later version reads them.
    """
    if expansion is not None:
        mapping = {**mapping, "expansion": expansion}
    canonical = json.dumps(mapping, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
