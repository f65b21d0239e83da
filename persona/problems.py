"""Every reason for a refusal and every kind of error, each with the code that it keeps everywhere.

The same code appears in HTTP problem documents, socket replies, journal fields, PAM messages and
``--json`` output.  Codes are only ever added, never renamed: dashboards and scripts match on them.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a request was denied, or why an answer could not be given (which is a denial too)."""

    NO_MATCHING_POLICY = "no_matching_policy"
    INVALID_PERSONA = "invalid_persona"  # the broker cannot read the persona that a policy hands out
    INVALID_POLICY = "invalid_policy"  # the broker cannot read a policy that is for the user
    LOAD_EXCEEDS_THRESHOLD = "load_exceeds_threshold"
    LOAD_UNKNOWN = "load_unknown"
    OUTSIDE_HOURS = "outside_hours"
    VM_UNHEALTHY = "vm_unhealthy"
    DEPENDENCY_MISSING = "dependency_missing"
    PROGRAM_NOT_TRUSTED = "program_not_trusted"
    PROGRAM_UNREADABLE = "program_unreadable"
    ARGV_TOO_LONG = "argv_too_long"
    BROKER_UNREACHABLE = "broker_unreachable"
    BROKER_MISBEHAVED = "broker_misbehaved"
    AGENT_STOPPING = "agent_stopping"
    AGENT_OVERLOADED = "agent_overloaded"
    AUDIT_FULL = "audit_full"  # what would start could not be recorded, and the operator asked for nothing then
    SESSION_REVOKED = "session_revoked"
    SESSION_UNKNOWN = "session_unknown"
    GUEST_QUARANTINED = "guest_quarantined"  # since the broker was restored from a backup
    NOT_APPROVED = "not_approved"
    OTHER_FILE = "other_file"
    OTHER_ARGUMENTS = "other_arguments"
    KERNEL_LAYER_MISSING = "kernel_layer_missing"
    PERSONA_UNAVAILABLE = "persona_unavailable"  # its document cannot be had
    MEMORY_LIMIT = "memory_limit"  # killed: out of memory under its persona
    PIDS_LIMIT = "pids_limit"  # no more processes under its persona
    PERSONA_WITHDRAWN = "persona_withdrawn"  # frozen or killed: its session's persona does not allow it any more
    NETWORK_REFUSED = "network_refused"  # its persona does not list the destination, or the source
    ENFORCEMENT_FAILED = "enforcement_failed"  # its limits or rules could not be put in place


class UnknownReason(str):
    """A reason of a newer version than this one: shown and kept as it is, and none of ``Reason``."""

    __slots__ = ()


AnyReason = Reason | UnknownReason


class Fault(StrEnum):
    """What was wrong with a call itself, as opposed to what it asked for."""

    BAD_DOCUMENT = "bad_document"
    BAD_REQUEST = "bad_request"
    TOO_LARGE = "too_large"
    UNAUTHENTICATED = "unauthenticated"
    NOT_YOUR_VM = "not_your_vm"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    GROUPS_CHANGED = "groups_changed"  # a guest named its users' groups by an older list of those that matter
    NOT_READY = "not_ready"
    OVERLOADED = "overloaded"
    INTERNAL = "internal"


class PersonaError(Exception):
    """Base of every error raised on purpose: a stable code and one sentence for a person."""

    def __init__(self, code: Reason | Fault, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
