"""The gate's seccomp filter and the ioctls of its listener, as seccomp(2) and seccomp_unotify(2) name them.

libseccomp 2.5 cannot set WAIT_KILLABLE_RECV, and the filter must be the same for the PAM module and
for persona-shell: so the instructions are written out here, once, and both load what the agent
hands them.  This module decides nothing and holds no state.
"""

import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from persona_guest.kernel.libc import LIBC, failure

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 5
PR_SET_NO_NEW_PRIVS = 38

_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_USER_NOTIF = 0x7FC00000
_RET_ALLOW = 0x7FFF0000

_LD_W_ABS, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARG1_LOW = 0, 4, 24  # struct seccomp_data, little endian

_X32_SYSCALL_BIT = 0x40000000

AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_I386 = 0x40000003
AUDIT_ARCH_AARCH64 = 0xC00000B7
AUDIT_ARCH_ARM = 0x40000028


class Abi(NamedTuple):
    """System call numbers of one ABI, and its pointer size in bytes."""

    audit_arch: int
    execve: int
    execveat: int
    seccomp: int
    word: int


# The ABIs that a kernel for this machine can run.  Every one must be listed: an exec through an ABI
# that the filter forgot (int 0x80 on x86-64) would not be seen at all.
_ABIS: dict[str, tuple[Abi, ...]] = {
    "x86_64": (Abi(AUDIT_ARCH_X86_64, 59, 322, 317, 8), Abi(AUDIT_ARCH_I386, 11, 358, 354, 4)),
    "aarch64": (Abi(AUDIT_ARCH_AARCH64, 221, 281, 277, 8), Abi(AUDIT_ARCH_ARM, 11, 387, 383, 4)),
}

ABI_BY_ARCH: dict[int, Abi] = {abi.audit_arch: abi for abis in _ABIS.values() for abi in abis}


def gate_filter(machine: str | None = None) -> bytes:
    """The filter as an array of ``struct sock_filter`` (8 bytes each).

    execve and execveat of every ABI go to the listener; x32 calls fail with ENOSYS; an unknown ABI
    kills the process; asking for a listener of one's own fails with EBUSY, also once ours is gone.
    Raises ``NotImplementedError`` for a machine whose ABIs are not listed.
    """
    name = machine or os.uname().machine
    abis = _ABIS.get(name)
    if abis is None:
        raise NotImplementedError(f"no gate filter for machine {name!r}; known: {', '.join(sorted(_ABIS))}")
    program: list[tuple[int, int, str, str]] = [(_LD_W_ABS, _OFFSET_ARCH, "", "")]
    labels: dict[str, int] = {}
    program += [(_JEQ, abi.audit_arch, f"abi{abi.audit_arch}", "") for abi in abis]
    program.append((_RET, _RET_KILL_PROCESS, "", ""))
    for abi in abis:
        labels[f"abi{abi.audit_arch}"] = len(program)
        program.append((_LD_W_ABS, _OFFSET_NR, "", ""))
        if abi.audit_arch == AUDIT_ARCH_X86_64:
            program.append((_JGE, _X32_SYSCALL_BIT, "x32", ""))
        program += [
            (_JEQ, abi.execve, "notify", ""),
            (_JEQ, abi.execveat, "notify", ""),
            (_JEQ, abi.seccomp, "seccomp", ""),
            (_RET, _RET_ALLOW, "", ""),
        ]
    labels["seccomp"] = len(program)
    program += [
        (_LD_W_ABS, _OFFSET_ARG1_LOW, "", ""),
        (_JSET, SECCOMP_FILTER_FLAG_NEW_LISTENER, "busy", ""),
        (_RET, _RET_ALLOW, "", ""),
    ]
    for label, action in (
        ("busy", _RET_ERRNO | errno.EBUSY),
        ("x32", _RET_ERRNO | errno.ENOSYS),
        ("notify", _RET_USER_NOTIF),
    ):
        labels[label] = len(program)
        program.append((_RET, action, "", ""))
    return b"".join(
        struct.pack("=HBBI", op, labels[yes] - at - 1 if yes else 0, labels[no] - at - 1 if no else 0, k)
        for at, (op, k, yes, no) in enumerate(program)
    )


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}


def install_listener(instructions: bytes) -> int:
    """Loads the filter into the calling thread and returns its listener's descriptor (CLOEXEC).

    Needs CAP_SYS_ADMIN or no_new_privs.  Raises ``OSError``: EBUSY where a listener is in the
    filter chain already.
    """
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = _SockFprog(len(instructions) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    fd: int = LIBC.syscall(_SYS_SECCOMP[os.uname().machine], SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program))
    if fd < 0:
        raise failure("seccomp")
    return fd


def set_no_new_privs() -> None:
    """prctl(PR_SET_NO_NEW_PRIVS); raises ``OSError``."""
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


# --- the listener -----------------------------------------------------------------------------------

_NOTIF_RECV = 0xC0502100
_NOTIF_SEND = 0xC0182101
_NOTIF_ID_VALID = 0x40082102
_NOTIF_SET_FLAGS = 0x40082104
_FD_SYNC_WAKE_UP = 1
_FLAG_CONTINUE = 1

NOTIF_SIZE = 80
_NOTIF = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ID = struct.Struct("=Q")
_EMPTY = bytes(NOTIF_SIZE)


class Notification(NamedTuple):
    """struct seccomp_notif: ``tid`` is a thread's id; ``args`` are the raw system call arguments."""

    id: int
    tid: int
    nr: int
    arch: int
    args: tuple[int, int, int, int, int, int]


def parse_notification(raw: bytes | bytearray) -> Notification:
    """The 80 bytes of a struct seccomp_notif as a value."""
    ident, tid, _flags, nr, arch, _ip, *args = _NOTIF.unpack(raw)
    return Notification(ident, tid, nr, arch, (args[0], args[1], args[2], args[3], args[4], args[5]))


def receive(listener: int, buffer: bytearray) -> Notification | None:
    """Takes one notification; ``None`` where it was withdrawn meanwhile (its task was killed), or a signal came.

    ``buffer`` (80 bytes) keeps the raw struct.  Call only after POLLIN: it blocks otherwise, and where somebody else
    reads the same listener.
    """
    buffer[:] = _EMPTY  # the kernel refuses a struct that is not zeroed
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, buffer, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
            return None
        raise
    return parse_notification(buffer)


def still_valid(listener: int, ident: int) -> bool:
    """Whether the task still waits for this notification; until then what was read of it is its own."""
    try:
        fcntl.ioctl(listener, _NOTIF_ID_VALID, _ID.pack(ident))
    except OSError:
        return False
    return True


def respond_continue(listener: int, ident: int) -> bool:
    """Lets the system call go on; false where the task is gone."""
    return _respond(listener, _RESPONSE.pack(ident, 0, 0, _FLAG_CONTINUE))


def respond_error(listener: int, ident: int, number: int) -> bool:
    """Fails the system call with errno ``number``; false where the task is gone."""
    return _respond(listener, _RESPONSE.pack(ident, 0, -number, 0))


def _respond(listener: int, response: bytes) -> bool:
    try:
        fcntl.ioctl(listener, _NOTIF_SEND, response)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINPROGRESS, errno.EINTR):
            return False
        raise
    return True


def is_listener(fd: int) -> bool:
    """Whether a descriptor that somebody handed over is what they say."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:seccomp notify"
    except OSError:  # a file whose path is too long to be told, which its sender may choose
        return False


def use_synchronous_wakeup(listener: int) -> bool:
    """Asks for wake-ups on the task's own CPU (Linux 6.6); false where the kernel has none."""
    try:
        fcntl.ioctl(listener, _NOTIF_SET_FLAGS, _FD_SYNC_WAKE_UP)
    except OSError:
        return False
    return True
