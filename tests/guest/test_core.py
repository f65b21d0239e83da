"""The agent's pure parts: leases, shebang lines, packets, messages, settings, who is exempt."""

import contextlib
import json
import struct
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from persona_guest.audit.upload import Recorder
from persona_guest.broker.http import Body, Connection
from persona_guest.core import pam_protocol
from persona_guest.core.leases import LeaseBook, Question
from persona_guest.core.messages import denial_line, printable
from persona_guest.kernel import seccomp
from persona_guest.login.exemptions import Exemption, Recent, exemption
from persona_guest.program import elf
from persona_guest.program.shebang import Format, Shebang, interpreter_argv, parse_head
from persona_guest.settings import Broker, Gate, Mode, SettingsError, load, parse

from persona import wire
from persona.codec import MAX_BODY
from persona.decisions import Denied, Granted, Lease, PersonaRef, Program, Subject, Width
from persona.problems import Reason
from persona.record_codec import Record, decode_record

LS = Program("/usr/bin/ls", ("ls",), ("/usr/bin/ls",))


def question(*argv: bytes, file: int = 2, argv0: bytes = b"", complete: bool = True) -> Question:
    return Question(1, file, argv0, argv, complete, LS)


def granted(width: Width, seconds: float = 30, generation: int = 0) -> Granted:
    return Granted(PersonaRef("A", 1), "p", Lease(seconds, width), generation)


def test_wide_leases_cover_any_arguments_of_one_file() -> None:
    book = LeaseBook()
    book.keep(question(b"ls"), granted(Width.PROGRAM), 0)
    assert book.lookup(question(b"ls", b"-l"), 1) is not None
    assert book.lookup(question(b"ls", file=3), 1) is None
    assert book.lookup(question(b"ls", argv0=b"cat"), 1) is None


def test_narrow_leases_cover_one_command_line() -> None:
    book = LeaseBook()
    book.keep(question(b"git", b"log"), granted(Width.ARGV), 0)
    assert book.lookup(question(b"git", b"log"), 1) is not None
    assert book.lookup(question(b"git", b"push"), 1) is None
    assert book.lookup(question(b"git", b"log", complete=False), 1) is None


def test_leases_end_by_time_by_event_and_never_begin_stale() -> None:
    book = LeaseBook(grace_s=5)
    book.advance(3)
    book.keep(question(b"ls"), granted(Width.PROGRAM, generation=2), 0)
    assert book.lookup(question(b"ls"), 1) is None
    book.keep(question(b"ls"), granted(Width.PROGRAM, generation=3), 0)
    assert book.lookup(question(b"ls"), 29) is not None
    assert book.lookup(question(b"ls"), 30) is None
    assert book.within_grace(question(b"ls"), 34) is not None
    assert book.within_grace(question(b"ls"), 35) is None
    book.advance(4)
    assert book.within_grace(question(b"ls"), 1) is None


def test_the_book_is_bounded() -> None:
    book = LeaseBook()
    for number in range(40_000):
        book.keep(question(b"ls", file=number), granted(Width.PROGRAM), 0)
    assert len(book._wide) <= 16_384


def test_the_book_is_bounded_in_bytes_and_no_holder_pushes_out_another() -> None:
    book = LeaseBook()
    book.keep(question(b"ls"), granted(Width.PROGRAM), 0)
    mine = question(b"git", b"log")
    book.keep(mine, granted(Width.ARGV), 0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(1000):  # 64 KB each, as much of a command line as is read
            other = question(b"x", b"%d" % number, b"x" * 65_000)._replace(holder=2)
            book.keep(other, granted(Width.ARGV), 0)
        for number in range(1000):  # as many arguments as are read
            other = question(*(b"%d-%d" % (number, index) for index in range(1024)))._replace(holder=3)
            book.keep(other, granted(Width.ARGV), 0)
        assert tracemalloc.get_traced_memory()[0] - before < 24 << 20
    finally:
        tracemalloc.stop()
    assert book.lookup(other, 1) is not None
    assert book.lookup(question(b"ls", b"-l"), 1) is not None and book.lookup(mine, 1) is not None
    for _ in range(10_000):  # the same again takes no more room
        book.keep(mine, granted(Width.ARGV), 0)
    assert book.lookup(question(b"ls"), 1) is not None


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"\x7fELF....", Format.ELF),
        (b"#!/bin/sh\necho", Shebang(b"/bin/sh", None)),
        (b"#! /bin/sh -e \nx", Shebang(b"/bin/sh", b"-e")),
        (b"#!/usr/bin/env python3 -u\n", Shebang(b"/usr/bin/env", b"python3 -u")),
        (b"#!\t/bin/awk\t-f\n", Shebang(b"/bin/awk", b"-f")),
        (b"#!/bin/sh", Shebang(b"/bin/sh", None)),
        (b"#!\n", Format.OTHER),
        (b"#!" + b"/x" * 200, Format.OTHER),
        (b"echo hi", Format.OTHER),
        (b"", Format.OTHER),
    ],
)
def test_heads(head: bytes, found: object) -> None:
    assert parse_head(head[:256]) == found


@given(st.binary(max_size=256))
def test_any_head_is_read(head: bytes) -> None:
    found = parse_head(head)
    if isinstance(found, Shebang):
        assert found.interpreter
        assert b" " not in found.interpreter


@given(st.binary(max_size=256), st.binary(max_size=512))
def test_any_elf_is_read(head: bytes, rest: bytes) -> None:
    whole = b"\x7fELF" + head + rest
    found = elf.parse(whole[:256], lambda at, size: whole[at : at + size])
    assert found.interpreter is None or b"\0" not in found.interpreter


def test_interpreter_argv_is_the_kernels() -> None:
    made = interpreter_argv(b"./x", Shebang(b"/usr/bin/env", b"python3 -u"), (b"x", b"a"))
    assert made == (b"/usr/bin/env", b"python3 -u", b"./x", b"a")


def packet(op: int, count: int, body: bytes, magic: int = pam_protocol.MAGIC) -> bytes:
    return struct.pack("=IHH", magic, op, count) + body


def test_pam_packets() -> None:
    body = struct.pack("=I", 1000) + b"sshd\0alice\x0010.0.0.5\0/bin/bash\0staff\0"
    op, caller = pam_protocol.parse(packet(2, 1, body))
    assert op is pam_protocol.Op.OPEN
    assert caller == pam_protocol.Caller(1000, "sshd", "alice", "10.0.0.5", "/bin/bash", ("staff",))
    for bad in (
        packet(2, 2, body), packet(2, 0, body), packet(9, 1, body), packet(2, 1, body, magic=7),
        packet(2, 1, body[:-1]), packet(3, 0, b"x"), packet(2, 1, b""), b"", b"x" * 9000,
        packet(2, 1, body.replace(b"alice", b"")), packet(2, 1, body.replace(b"alice", b"\xff")),
        packet(2, 1, body.replace(b"alice", b"a" * 300)),
    ):  # fmt: skip
        with pytest.raises(pam_protocol.WireError):
            pam_protocol.parse(bad)


def test_pam_packets_of_more_groups() -> None:
    assert pam_protocol.parse(packet(5, 2, b"a\0b\0")) == (pam_protocol.Op.GROUPS, pam_protocol.Groups(("a", "b")))
    # a name that no policy can have is no reason to refuse anybody
    assert pam_protocol.parse(packet(5, 2, b"\xff\0b\0"))[1] == pam_protocol.Groups(("b",))
    body = struct.pack("=I", 1000) + b"ss\xffhd\0alice\0\xff\0/bin/bash\0sta\xfff\0users\0"
    caller = pam_protocol.parse(packet(2, 2, body))[1]
    assert isinstance(caller, pam_protocol.Caller)
    assert (caller.user, caller.groups) == ("alice", ("users",))
    for bad in (
        packet(5, 2, b"a\0"),
        packet(5, 0, b"a\0"),
        packet(5, 129, b"a\0" * 129),
        packet(5, 1, b"a" * 256 + b"\0"),
    ):
        with pytest.raises(pam_protocol.WireError):
            pam_protocol.parse(bad)


@given(st.binary(max_size=300))
def test_any_packet_is_refused_or_read(data: bytes) -> None:
    for prefix in (b"", struct.pack("=I", pam_protocol.MAGIC)):
        with contextlib.suppress(pam_protocol.WireError):
            pam_protocol.parse(prefix + data)


def test_messages_cannot_drive_a_terminal() -> None:
    denied = Denied(Reason.NO_MATCHING_POLICY, "p", "A", "no\x1b[2Jway")
    line = denial_line("\x1b]0;x\x07ls\n", denied)
    assert line.isprintable()
    assert "no_matching_policy under persona A (policy p)" in line
    assert len(printable("x" * 10_000)) <= 400


@pytest.mark.parametrize(
    ("uid", "groups", "found"),
    [(0, (), Exemption.ROOT), (999, (), Exemption.SYSTEM_USER), (1000, (), None),
     (1000, ("persona-break-glass",), Exemption.BREAK_GLASS)],
)  # fmt: skip
def test_exemption(uid: int, groups: tuple[str, ...], found: Exemption | None) -> None:
    assert exemption(uid, groups, Gate()) == found


def test_a_fresh_install_complains(tmp_path: Path) -> None:
    assert load(tmp_path / "absent.toml").mode is Mode.COMPLAIN
    shipped = Path(__file__).parents[2] / "packaging" / "etc" / "guest.toml"
    assert load(shipped).mode is Mode.COMPLAIN


@pytest.mark.parametrize(
    ("document", "key"),
    [({"mode": "off"}, "mode"), ({"mod": "enforce"}, "mod"), ({"broker": {"timeout_s": "2"}}, "broker.timeout_s"),
     ({"broker": {"timeout_s": 99}}, "broker.timeout_s"), ({"broker": {"url": "http://x"}}, "broker.url"),
     ({"gate": {"secure_path": ["bin"]}}, "gate.secure_path"), ({"vm": {"name": "a/b"}}, "vm.name"),
     ({"gate": 7}, "gate"), ({"gate": {"uid_min": True}}, "gate.uid_min"),
     ({"paths": {"bpf_dir": "/sys/fs/bpf/../x"}}, "paths.bpf_dir"), ({"paths": {"bpf_dir": "/"}}, "paths.bpf_dir")],
)  # fmt: skip
def test_settings_are_refused_by_name(document: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse(document, "guest.toml")
    assert f"guest.toml: {key}" in error.value.message


def simulate(instructions: bytes, arch: int, nr: int, arg1: int = 0) -> int:
    """A classic BPF interpreter for the few instructions that the filter has."""
    program = list(struct.iter_unpack("=HBBI", instructions))
    data = struct.pack("=iIQ6Q", nr, arch, 0, 0, arg1, 0, 0, 0, 0)
    accumulator, at = 0, 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            return int(k)
        else:
            hit = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += yes if hit else no


NOTIFY, ALLOW, KILL = 0x7FC00000, 0x7FFF0000, 0x80000000


@pytest.mark.parametrize(
    ("arch", "nr", "arg1", "action"),
    [
        (seccomp.AUDIT_ARCH_X86_64, 59, 0, NOTIFY), (seccomp.AUDIT_ARCH_X86_64, 322, 0, NOTIFY),
        (seccomp.AUDIT_ARCH_X86_64, 0, 0, ALLOW), (seccomp.AUDIT_ARCH_X86_64, 317, 8, 0x50000 | 16),
        (seccomp.AUDIT_ARCH_X86_64, 317, 1, ALLOW), (seccomp.AUDIT_ARCH_X86_64, 0x40000000 | 520, 0, 0x50000 | 38),
        (seccomp.AUDIT_ARCH_I386, 11, 0, NOTIFY), (seccomp.AUDIT_ARCH_I386, 358, 0, NOTIFY),
        (seccomp.AUDIT_ARCH_I386, 59, 0, ALLOW), (seccomp.AUDIT_ARCH_I386, 354, 8, 0x50000 | 16),
        (seccomp.AUDIT_ARCH_AARCH64, 221, 0, KILL), (0, 59, 0, KILL),
    ],
)  # fmt: skip
def test_the_filter_knows_every_abi(arch: int, nr: int, arg1: int, action: int) -> None:
    assert simulate(seccomp.gate_filter("x86_64"), arch, nr, arg1) == action


def test_an_unknown_machine_has_no_filter() -> None:
    with pytest.raises(NotImplementedError):
        seccomp.gate_filter("pdp11")


def test_records_of_long_command_lines_fit_into_the_brokers_bodies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies: list[dict[str, Any]] = []

    def call(_self: Connection, _method: str, _path: str, body: Body, _deadline: float) -> tuple[int, None]:
        bodies.append(json.loads(json.dumps(body(wire.CURRENT))))
        return 204, None

    monkeypatch.setattr(Connection, "call", call)
    recorder = Recorder(Broker(), lambda _record: None)
    long = tuple("\x01" * 256 for _ in range(16))
    for number in range(40):  # of one user, for whom memory has a fifth of its room at most
        recorder.add(
            Record(number, "s", "u", "/" + "\x01" * 4000, long, "denied", None, None, None, None, "exec", False, False)
        )
    recorder.close()
    assert sum(len(body["records"]) for body in bodies) == 40
    assert max(len(json.dumps(body)) for body in bodies) <= MAX_BODY
    assert all(decode_record(record) for body in bodies for record in body["records"])


@pytest.mark.parametrize("refusal", [400, 413, 422])
def test_a_record_that_the_broker_refuses_costs_no_other(monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    kept: list[float] = []
    lost: list[int] = []

    def call(_self: Connection, _method: str, _path: str, body: Body, _deadline: float) -> tuple[int, None]:
        said: Any = body(wire.FIRST)
        numbers = [record["at"] for record in said["records"]]
        if 77 in numbers or 78 in numbers:
            return refusal, None  # as 0.1.0, which says no more
        kept.extend(numbers)
        lost.append(said["lost"])
        return 204, None

    monkeypatch.setattr(Connection, "call", call)
    recorder = Recorder(Broker(), lambda _record: None)
    for number in range(300):
        recorder.add(Record(number, "s", "u", "/x", (), "denied", None, None, None, None, "exec", False, False))
    recorder.close()
    assert kept == [number for number in range(300) if number not in (77, 78)]
    assert sum(lost) == 2


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_a_broker_that_takes_no_records_now_gets_them_later(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    answers = [status, status]
    kept: list[float] = []

    def call(_self: Connection, _method: str, _path: str, body: Body, _deadline: float) -> tuple[int, None]:
        if answers:
            return answers.pop(), None
        said: Any = body(wire.CURRENT)
        kept.extend(record["at"] for record in said["records"])
        assert said["lost"] == 0
        return 204, None

    monkeypatch.setattr(Connection, "call", call)
    recorder = Recorder(Broker(), lambda _record: None)
    recorder.add(Record(1, "s", "u", "/x", (), "denied", None, None, None, None, "exec", False, False))
    deadline = time.monotonic() + 10
    while answers and time.monotonic() < deadline:
        time.sleep(0.05)
    recorder.close()
    assert kept == [1]


def test_what_a_record_needs_to_be_looked_up_is_looked_up_by_the_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    monkeypatch.setattr(Connection, "call", lambda *_: (204, None))

    def looked_up() -> Record:
        threads.append(threading.current_thread().name)
        return Record(0, "s", "u", "/bin/true", (), "denied", None, None, None, None, "exec", False, False)

    journal: list[Record] = []
    recorder = Recorder(Broker(), journal.append)
    recorder.add(looked_up)
    recorder.close()
    assert threads == ["recorder"]
    assert [record.user for record in journal] == ["u"]


def test_an_admission_is_used_again_once_by_the_same_process_until_an_event_comes() -> None:
    alice, bob = Subject("alice", (), "vm"), Subject("bob", (), "vm")
    recent: Recent[str] = Recent()
    recent.keep(7, alice, "yes", generation=3, now=100.0)
    assert recent.take(8, alice, 3, 100.1) is None
    assert recent.take(7, bob, 3, 100.1) is None
    assert recent.take(7, alice, 3, 100.1) == "yes"
    assert recent.take(7, alice, 3, 100.1) is None
    recent.keep(7, alice, "yes", 3, 100.0)
    assert recent.take(7, alice, 4, 100.1) is None, "a policy may have changed"
    recent.keep(7, alice, "yes", 3, 100.0)
    assert recent.take(7, alice, 3, 120.0) is None, "too old"
