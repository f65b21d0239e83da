"""The JSON Schema of the documents: served by the broker, used by editors, read by the parser for its field names.

The parser is stricter than the schema where a schema cannot say it (patterns that can never match);
never looser.
"""

from typing import Any

NAME = r"^[A-Za-z][A-Za-z0-9._-]{0,63}$"
ORDER_MAX = 9999

_STRINGS = {"type": "array", "items": {"type": "string"}, "maxItems": 256}
_AMOUNT = {"type": ["string", "integer"]}
_THRESHOLD = {
    "type": "object",
    "additionalProperties": False,
    "required": ["below"],
    "properties": {
        "below": {"type": "number", "minimum": 1, "maximum": 100},
        "again_below": {"type": "number", "minimum": 1, "maximum": 100},
    },
}

_PRESSURE = {"type": "number", "minimum": 1, "maximum": 100}
_VM_HEALTH = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "disk_free_above": _AMOUNT,  # "10%" or bytes
        "memory_available_above": _AMOUNT,
        "pressure_below": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"cpu": _PRESSURE, "memory": _PRESSURE, "io": _PRESSURE},
        },
        "load_below": {"type": "number", "minimum": 0.01, "maximum": 1000},
        "failed_units_below": {"type": "number", "minimum": 1, "maximum": 1000},
        "errors_below": {"type": "number", "minimum": 1, "maximum": 1000000},
        "clock_skew_below": {"type": ["string", "number"]},
        "layers": {"type": "array", "items": {"enum": ["seccomp", "bpf", "verify", "landlock"]}, "maxItems": 16},
    },
}

PERSONA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "name", "command_whitelist"],
    "properties": {
        "kind": {"const": "Persona"},
        "name": {"type": "string", "pattern": NAME},
        "description": {"type": "string", "maxLength": 1000},
        "command_whitelist": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 1024},
        "resource_limits": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "cpu": {"type": ["string", "number"]},
                "memory": _AMOUNT,
                "disk_io": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "read_bps": _AMOUNT,
                        "write_bps": _AMOUNT,
                        "read_iops": {"type": "integer", "minimum": 1},
                        "write_iops": {"type": "integer", "minimum": 1},
                    },
                },
                "pids": {"type": "integer", "minimum": 1, "maximum": 4194304},
                "per": {"enum": ["session", "persona"]},
            },
        },
        "network_access": _STRINGS,
        "dependencies": _STRINGS,
        "priority": {"type": "integer", "minimum": 0, "maximum": 1000},
        "on_revoke": {"enum": ["finish", "freeze", "kill"]},
        "home_programs": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 1024},
            "maxItems": 256,
        },
    },
}

POLICY: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "name", "subjects", "persona"],
    "properties": {
        "kind": {"const": "Policy"},
        "name": {"type": "string", "pattern": NAME},
        "description": {"type": "string", "maxLength": 1000},
        "subjects": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"users": _STRINGS, "groups": _STRINGS},
        },
        "commands": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 1024},
        "vms": _STRINGS,
        "when": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "host_load": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": dict.fromkeys(("cpu", "memory", "network", "disk", "pressure"), _THRESHOLD),
                },
                "vm_health": _VM_HEALTH,
                "hours": {"type": "string"},
            },
        },
        "persona": {"type": "string", "pattern": NAME},
        "order": {"type": "integer", "minimum": 0, "maximum": ORDER_MAX},
    },
}

COMMAND_SET: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "name", "commands"],
    "properties": {
        "kind": {"const": "CommandSet"},
        "name": {"type": "string", "pattern": NAME},
        "description": {"type": "string", "maxLength": 1000},
        "commands": {
            "type": "array",
            "items": {"type": "string", "pattern": r"^[^!@]"},
            "minItems": 1,
            "maxItems": 1024,
        },
    },
}

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Persona, Policy and CommandSet documents",
    "oneOf": [PERSONA, POLICY, COMMAND_SET],
}


def fields(schema: dict[str, Any], *path: str) -> tuple[str, ...]:
    """The field names that a schema knows, of itself or of the object field at ``path``."""
    for name in path:
        schema = schema["properties"][name]
    return tuple(schema["properties"])
