"""What is read of a machine's health, what is left out of it, and when it is told."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from persona_guest.health import rules
from persona_guest.health.report import REPORT_S, Journal, Reporter, Watch
from persona_guest.settings import Broker as BrokerSettings
from persona_guest.system.units import Units, UnitsError

from persona.codec import MAX_BODY
from persona.health import Report, Space, decode_report, encode_report

MOUNTINFO = r"""
21 1 254:0 / / rw,noatime shared:1 - ext4 /dev/vda rw
22 21 0:20 / /proc rw,nosuid - proc proc rw
23 21 254:0 /var/lib/persona /var/lib/persona rw - ext4 /dev/vda rw
24 21 254:16 / /srv/a\040b ro,relatime - ext4 /dev/vdb rw
25 21 7:0 / /snap/core ro - squashfs /dev/loop0 ro
26 21 0:44 / /run rw - tmpfs tmpfs rw,size=400000k
27 21 0:45 / /mnt/net rw - nfs4 host:/export rw
28 21 0:46 / /home/eve/lie rw - fuse.x /dev/vdc rw
29 21 254:32 / /mnt/ntfs rw - fuseblk /dev/vdd rw
30 21 0:47 /@ /data rw - btrfs /dev/vde rw
31 21 garbage
""".strip()


def test_real_mounts_once_each_by_their_shortest_path() -> None:
    assert rules.real_mounts(MOUNTINFO) == ["/", "/data", "/srv/a b"]
    assert rules.real_mounts("") == []


def test_figures_of_proc() -> None:
    assert rules.memory("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:  512 kB\nHugePages_Total:  0\n") == Space(
        2 << 20, 1 << 19
    )
    assert rules.memory("MemTotal: 1 kB\n") is None
    assert rules.pressure("some avg10=1.50 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.10 avg60=0 total=1\n") == 1.5
    assert rules.pressure("") is None
    assert rules.load_average("3.00 0.10 0.05 1/99 1234\n", 2) == 1.5


SSHD = {"_UID": 0, "SYSLOG_IDENTIFIER": "sshd"}


@pytest.mark.parametrize(
    ("entry", "counted"),
    [
        ({}, True),  # the kernel's own
        ({"_UID": 0}, True),
        ({"_UID": 101, "_AUDIT_LOGINUID": 4294967295}, True),
        ({"_UID": 61184}, True),  # DynamicUser=
        ({"_UID": 1000}, False),  # logger -p err
        ({"_UID": 0, "_AUDIT_LOGINUID": 1000}, False),  # sudo of a login user
        ({"_UID": 0, "_AUDIT_LOGINUID": 0}, True),
        ({"_UID": "nonsense"}, True),
        ({"_UID": 0, "COREDUMP_UID": 1000}, False),  # systemd-coredump tells of a user's crash
        ({"_UID": 0, "COREDUMP_UID": 0}, True),
        ({"_UID": 1000, "COREDUMP_UID": 0}, False),  # a user who says so of root
        ({"_UID": 0, "UNIT": "user@1000.service"}, False),  # PID 1: Failed to start User Manager for UID 1000.
        ({"_UID": 0, "UNIT": "nginx.service"}, True),
        ({"_TRANSPORT": "kernel", "MESSAGE": "Memory cgroup out of memory: Killed process 7 (x)"}, False),
        ({"_TRANSPORT": "kernel", "MESSAGE": b"Memory cgroup out of memory: Killed process 7 (\xff)"}, False),
        ({"_TRANSPORT": "kernel", "MESSAGE": "Out of memory: Killed process 7 (x)"}, True),
        ({"_TRANSPORT": "kernel", "MESSAGE": "I/O error, dev vda, sector 1"}, True),
        ({"_UID": 0, "MESSAGE": "Memory cgroup out of memory: it says"}, True),
        (SSHD | {"MESSAGE": "error: kex_exchange_identification: Connection closed by remote host"}, False),
        (SSHD | {"MESSAGE": "error: Protocol major versions differ: 2 vs. 1"}, False),
        (SSHD | {"MESSAGE": "error: kex_protocol_error: type 90 seq 3 [preauth]"}, False),
        (SSHD | {"MESSAGE": "fatal: Timeout before authentication for 127.0.0.1 port 5"}, False),
        (SSHD | {"MESSAGE": "error: beginning MaxStartups throttling"}, False),
        (SSHD | {"SYSLOG_IDENTIFIER": "sshd-session", "MESSAGE": "fatal: userauth_pubkey: x [preauth]"}, False),
        (SSHD | {"MESSAGE": "error: Could not load host key: /etc/ssh/ssh_host_rsa_key"}, True),
        ({"_UID": 0, "MESSAGE": "error: kex_exchange_identification: another's"}, True),
    ],
)
def test_errors_that_login_users_or_strangers_cause_do_not_count(entry: Mapping[str, object], counted: bool) -> None:
    assert rules.counts(entry, 1000) is counted


def test_the_error_rate_is_that_of_the_last_minute() -> None:
    errors = rules.Errors()
    for at in (900.0, 941.0, 999.0, 2000.0):  # the last while the clock was wrong
        errors.add(at, 1000)
    assert errors.count(1000) == 3
    assert errors.count(1050) == 2
    assert errors.count(1061) == 0
    for _ in range(20_000):
        errors.add(1000, 1000)
    assert errors.count(1000) == rules.COUNTED_MAX


REPORT = Report(
    disks={"/": Space(1 << 34, 1 << 33)},
    memory=Space(1 << 31, 1 << 30),
    pressure={"cpu": 10.0},
    load=1.0,
    failed_units=(),
    errors=0,
    clock_skew_s=0.0,
    layers={"seccomp": True},
)


@pytest.mark.parametrize(
    ("text", "uuid"),
    [
        ("6695EB01-F6A4-4304-89AA-97F2502E193F\n", "6695eb01-f6a4-4304-89aa-97f2502e193f"),
        ("00000000-0000-0000-0000-000000000000\n", ""),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff\n", ""),
        ("Not Settable\n", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_the_firmware_s_uuid_is_reported_where_there_is_one(tmp_path: Path, text: str | None, uuid: str) -> None:
    if text is not None:
        (tmp_path / "product_uuid").write_text(text)
    assert Watch(1000, dict, dmi=tmp_path).measure(None).uuid == uuid


@pytest.mark.parametrize(
    ("change", "news"),
    [
        ({}, False),
        ({"disks": {"/": Space(1 << 34, (1 << 33) - (1 << 20))}}, False),
        ({"disks": {"/": Space(1 << 34, 1 << 32)}}, True),
        ({"disks": {}}, True),
        ({"disks": {"/": Space(1 << 34, 1 << 33), "/srv": Space(1, 1)}}, True),
        ({"memory": None}, True),
        ({"memory": Space(1 << 31, 1 << 29)}, True),
        ({"pressure": {"cpu": 14.0}}, False),
        ({"pressure": {"cpu": 15.0}}, True),
        ({"load": 1.2}, False),
        ({"load": 1.3}, True),
        ({"failed_units": ("x.service",)}, True),
        ({"errors": 1}, True),
        ({"clock_skew_s": 0.9}, False),
        ({"clock_skew_s": -5.0}, True),
        ({"layers": {"seccomp": False}}, True),
    ],
)
def test_news(change: dict[str, Any], news: bool) -> None:
    assert rules.is_news(REPORT, replace(REPORT, **change)) is news


def test_the_clock_is_held_against_the_middle_of_the_call() -> None:
    assert rules.clock_skew(1000.4, 1000.6, 1000) == 0.0
    assert rules.clock_skew(1007.0, 1007.2, 1000) == 6.6
    assert rules.clock_skew(1000, 1003, 1000) is None
    assert rules.clock_skew(1000, 900, 1000) is None  # set in between


def test_this_machine() -> None:
    report = Watch(1000, lambda: {"seccomp": True}).measure(0.5)
    assert decode_report(encode_report(report)) == report
    assert report.memory is not None and 0 < report.memory.free <= report.memory.total
    assert report.load is not None
    assert (report.clock_skew_s, report.layers) == (0.5, {"seccomp": True})


def test_what_cannot_be_had_says_nothing_of_the_rest(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(
        "1 1 254:0 / / rw - ext4 /dev/vda rw\n2 1 254:1 / /nowhere rw - ext4 /dev/vdb rw\n"
    )
    (tmp_path / "loadavg").write_text("")
    report = Watch(1000, dict, tmp_path).measure(None)
    assert list(report.disks) == ["/"]
    assert report.disks["/"].total > 0
    assert (report.memory, report.load, report.pressure) == (None, None, {})


def test_without_a_bus_failed_units_are_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    with pytest.raises(UnitsError):
        Units().failed()
    assert Watch(1000, dict).measure(None).failed_units is None


def test_what_users_can_make_fail_is_no_failed_unit_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    users = (
        *("session-5.scope", "session-c1.scope", "user-1000.slice", "user-1000-x.slice"),
        *("run-user-1000.mount", "run-user-1000-doc.mount", "user-runtime-dir@1000.service", "user@1000.service"),
    )
    machines = ("nginx.service", "run-lock.mount", "run-r5.scope", "user.slice", "users@1.service")
    monkeypatch.setattr(Units, "failed", lambda _self: (*users * 10, *machines))
    assert Watch(1000, dict).measure(None).failed_units == machines  # and users' crowd out none


@pytest.mark.skipif(shutil.which("dbus-daemon") is None, reason="needs dbus-daemon")
def test_a_bus_without_systemd_is_an_error_and_the_connection_lasts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real bus; systemd itself is asked in the guest."""
    address = f"unix:path={tmp_path}/bus"
    argv = ["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={address}"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as bus:
        try:
            for _ in range(100):
                if (tmp_path / "bus").exists():
                    break
                time.sleep(0.02)
            monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
            units = Units()
            for _ in range(2):
                with pytest.raises(UnitsError, match=r"org\.freedesktop\.systemd1"):
                    units.failed()
            units.close()
        finally:
            bus.terminate()


def test_a_journal_that_cannot_be_read_is_not_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(1000)

    def broken(_now: float) -> None:
        raise OSError("gone")

    monkeypatch.setattr(journal, "_open", broken)
    assert journal.count(time.time()) is None


def test_an_entry_that_its_sender_made_unreadable_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """COREDUMP_TIMESTAMP=1000000000000000000000000000000, say: python3-systemd makes a date of it."""
    now = time.time()
    entry = {"_UID": 0, "__REALTIME_TIMESTAMP": datetime.fromtimestamp(now, UTC)}
    entries: list[Any] = [entry, OverflowError("int too large"), entry, {}]

    def get_next() -> Any:
        found = entries.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    journal = Journal(1000)
    monkeypatch.setattr(journal, "_open", lambda _now: Mock(get_next=get_next))
    assert journal.count(now) == 2


class Listener:
    """A stand-in for the broker, which keeps what it is told; the real one is in tests/broker and the guest."""

    def __init__(self, path: Path) -> None:
        self.bodies: list[Report] = []
        self.date = "Tue, 24 Nov 2026 20:00:00 GMT"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self.answer = 204
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                while line := stream.readline():
                    length = 0
                    while line.strip():
                        if line.lower().startswith(b"content-length:"):
                            length = int(line.split(b":")[1])
                        line = stream.readline()
                    if length:  # else the question after its version
                        self.bodies.append(decode_report(json.loads(stream.read(min(length, MAX_BODY)))))
                    connection.sendall(
                        f"HTTP/1.1 {self.answer} X\r\nContent-Length: 0\r\nDate: {self.date}\r\n\r\n".encode()
                    )

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class FakeWatch(Watch):
    """A machine whose health is what the test says."""

    def __init__(self) -> None:
        self.report = REPORT

    def measure(self, clock_skew_s: float | None) -> Report:
        return replace(self.report, clock_skew_s=clock_skew_s)


def test_reports_come_at_an_interval_and_news_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reporter, "_run", lambda self: None)  # the rounds are ours
    (tmp_path / "token").write_text("t")
    settings = BrokerSettings(url=f"unix:{tmp_path}/s", token_file=str(tmp_path / "token"), timeout_s=0.5)
    watch = FakeWatch()
    reporter = Reporter(settings, watch)
    reporter.round(0)  # nobody there
    broker = Listener(tmp_path / "s")
    try:
        now = 1795550400.0  # when the stand-in's Date is
        monkeypatch.setattr(time, "time", lambda: now + 3.5)
        for at in (1, 2, 3):
            reporter.round(at)
        assert [report.clock_skew_s for report in broker.bodies] == [None, 3.0]  # the second was news
        reporter.round(2 + REPORT_S)
        assert len(broker.bodies) == 3
        watch.report = replace(REPORT, errors=5)
        reporter.round(3 + REPORT_S)
        assert broker.bodies[-1].errors == 5
        broker.answer = 400  # refused: the same again would be refused again, but not for ever
        watch.report = REPORT
        reporter.round(4 + REPORT_S)
        reporter.round(5 + REPORT_S)
        assert len(broker.bodies) == 5
    finally:
        broker.close()
    assert os.path.exists(tmp_path / "s")
