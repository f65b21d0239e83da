"""``records tail``: what is found by which filter, and that nothing in a record can pose as something else."""

import json
import select
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import replace

import pytest
from persona_broker.audit.chain import Chain
from persona_broker.audit.core.format import split
from persona_broker.audit.delivery import Delivery
from persona_broker.audit.index import Index
from persona_broker.audit.search import Wanted, later, query_of
from persona_broker.store.sqlite import SqliteStore

from persona.answers import iso, local
from persona.problems import Reason
from persona.record_codec import Record, encode_record
from tests.broker.conftest import Broker, environment

LS = Record(
    1790000000.25, "s-1", "alice", "/usr/bin/ls", ("ls", "-l"), "granted", None, "A", 1, "a", "exec", False, False
)
NMAP = replace(LS, program="/usr/bin/nmap", argv=("nmap", "x"), decision="denied", reason=Reason.NO_MATCHING_POLICY)
RAW = replace(LS, user="eve", program="/opt/\udc80/nmap", argv=("nmap",))
WOULD = replace(NMAP, user="bob", reason=Reason.OUTSIDE_HOURS, complain=True)


def keep(broker: Broker, *records: Record, vm: str = "vm-1") -> None:
    SqliteStore(broker.directory / "db").close()
    with closing(Chain(broker.directory / "audit")) as chain:
        chain.deliver([Delivery(vm, [split(encode_record(record)) for record in records])])


@pytest.fixture
def filled(cli: Broker) -> Broker:
    keep(cli, LS, NMAP)
    keep(cli, replace(NMAP, at=1790000100.0, session="s-2"), RAW, vm="vm-2")
    keep(cli, WOULD)
    return cli


def programs(broker: Broker, *words: str) -> list[tuple[str, str, str]]:
    done = broker.run("records", "tail", "--json", *words)
    assert (done.returncode, done.stderr) == (0, "")
    found = map(json.loads, done.stdout.splitlines())
    return [(record["vm"], record["user"], record["program"].rpartition("/")[2]) for record in found]


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ((), "1 alice ls, 1 alice nmap, 2 alice nmap, 2 eve nmap, 1 bob nmap"),
        (("-n", "2"), "2 eve nmap, 1 bob nmap"),
        (("-n", "0"), ""),
        (("--user", "alice"), "1 alice ls, 1 alice nmap, 2 alice nmap"),
        (("--user", "alice", "-n", "1"), "2 alice nmap"),
        (("--user", "al"), ""),
        (("--vm", "vm-2"), "2 alice nmap, 2 eve nmap"),
        (("--denied",), "1 alice nmap, 2 alice nmap, 1 bob nmap"),
        (("--reason", "outside_hours"), "1 bob nmap"),
        (("--program", "ls"), "1 alice ls"),
        (("--program", "s"), ""),
        (("--program", "/usr/bin/nmap"), "1 alice nmap, 2 alice nmap, 1 bob nmap"),
        (("--program", "/opt/\udc80/nmap"), "2 eve nmap"),
        (("--since", "2026-09-21T14:14:20+00:00"), "2 alice nmap"),
        (("--since", "5s"), ""),
        (("--since", "9999d", "--denied", "--vm", "vm-1", "--program", "nmap", "--user", "bob"), "1 bob nmap"),
    ],
)
def test_filters(filled: Broker, words: tuple[str, ...], right: str) -> None:
    expected = [tuple(item.split()) for item in right.split(", ") if item]
    assert programs(filled, *words) == [(f"vm-{vm}", user, name) for vm, user, name in expected]


def test_distinct_counts_what_differs_in_time_and_session_only(filled: Broker) -> None:
    keep(filled, *(replace(NMAP, at=1790000200.0 + n, session=f"s-{n}", leased=n % 2 == 0) for n in range(3)))
    keep(filled, replace(NMAP, argv=("nmap", "y")))
    words = ("records", "tail", "--distinct", "--user", "alice", "--vm", "vm-1", "--denied")
    found = [json.loads(line) for line in filled.run(*words, "--json").stdout.splitlines()]
    assert [(record["argv"][1], record["count"]) for record in found] == [("x", 4), ("y", 1)]
    assert found[0]["at"] == "2026-09-21T14:16:42.000Z"  # the newest of them
    assert filled.run(*words).stdout.splitlines()[0].endswith("/usr/bin/nmap x  (4 times)")
    assert len(filled.run(*words, "-n", "1").stdout.splitlines()) == 1


def test_lines_say_the_zone_and_what_complain_mode_would_have_denied(filled: Broker) -> None:
    env = {**environment(), "TZ": "Asia/Kolkata"}
    done = subprocess.run(filled.argv("records", "tail"), env=env, capture_output=True, text=True, timeout=30)
    first, *_, last = done.stdout.splitlines()
    assert first == "2026-09-21T19:43:20+05:30  vm-1  alice  granted  exec  A (a)  /usr/bin/ls -l"
    assert "  would be denied (complain)  outside_hours  " in last
    assert "would be" not in filled.run("records", "tail", "--user", "alice").stdout


def test_a_line_names_the_file_and_cannot_be_forged(cli: Broker) -> None:
    keep(cli, replace(NMAP, argv=("git status", "a b", "it's", "\x1b[2J\n2026", "\u202e", "\udc80", "\\", "")))
    keep(cli, replace(NMAP, user="ali\nce", persona="\x07", policy="a\\b", argv=()))
    first, second = cli.run("records", "tail").stdout.splitlines()
    name, rest = "/usr/bin/nmap (called 'git status') ", r"'a b' $'it\'s' $'\x1b[2J\n2026' $'\u202e' $'\x80' '\' ''"
    assert first.endswith(name + rest)
    assert r"  $'ali\nce'  denied  no_matching_policy  \x07 (a\b)  " in second


def test_times_that_no_calendar_has_are_shown_all_the_same(cli: Broker) -> None:
    assert (iso(9e11), iso(1.5)) == (None, "1970-01-01T00:00:01.500Z")
    assert local(9e11) == "a time beyond the calendar"
    keep(cli, replace(LS, at=9e11))
    assert json.loads(cli.run("records", "tail", "--json").stdout)["at"] is None
    assert cli.run("records", "tail").stdout.startswith("a time beyond the calendar  vm-1  alice")


def test_a_record_that_cannot_be_read_hides_no_other(filled: Broker) -> None:
    with closing(sqlite3.connect(filled.directory / "db", isolation_level=None)) as record:
        record.execute("INSERT INTO records (guest, body) VALUES ('vm-1', 'torn {')")
        record.execute("INSERT INTO records (guest, body) VALUES ('vm-1', '[]')")
        record.execute("INSERT INTO records (guest, body) VALUES ('vm-1', '{}')")
    filled.run("migrate")
    done = filled.run("records", "tail", "--vm", "vm-1")
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, 6, "")
    assert done.stdout.count("unreadable") == 4  # its kind, and what it is about
    assert len(programs(filled, "--user", "alice")) == 3


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--since", "yesterday"), "or how long ago: 90s, 30m, 2h, 7d"),
        (("--since", "2026-01-01T12:00"), "has no zone; 2026-01-01T12:00:00+00:00 is that in UTC"),
        (("--since", "-3h"), "expected"),
        (("--reason", "no_match"), "did you mean 'no_matching_policy'?"),
        (("--reason", "xyzzy"), "there are agent_"),
        (("--reason", ""), "there are agent_"),
    ],
)
def test_what_is_refused_says_what_is_meant(filled: Broker, words: tuple[str, ...], why: str) -> None:
    done = filled.run("records", "tail", "=".join(words))
    assert done.returncode == 2
    assert why in done.stderr


def test_following_goes_by_the_filters(filled: Broker) -> None:
    words = ("records", "tail", "-f", "--json", "-n", "1", "--user", "alice", "--distinct", "--denied")
    following = subprocess.Popen(filled.argv(*words), env=environment(), text=True, stdout=subprocess.PIPE)
    try:
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["vm"] == "vm-2"
        keep(filled, LS, WOULD, replace(NMAP, argv=("nmap", "new")), *[LS] * 50)
        assert select.select([following.stdout], [], [], 10)[0]
        assert json.loads(following.stdout.readline())["argv"] == ["nmap", "new"]
        keep(filled, replace(NMAP, at=1.0, argv=("nmap", "new")), replace(NMAP, argv=("nmap", "newer")))
        assert json.loads(following.stdout.readline())["argv"] == ["nmap", "newer"]
    finally:
        following.kill()
        following.communicate()


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(user="bob"),
        Wanted(vm="vm-1"),
        Wanted(reason="outside_hours"),
        Wanted(user="b", vm="v"),
    ],
)
def test_what_is_rare_is_found_without_reading_all(cli: Broker, wanted: Wanted) -> None:
    keep(cli, LS)
    (segment,) = Chain(cli.directory / "audit").segments()
    with closing(Index(segment)) as index:
        query, values = query_of(wanted, None)
        plan = [row[-1] for row in index.rows(f"EXPLAIN QUERY PLAN {query}", *values, 20)]
    assert "SEARCH e USING INDEX entries_" in plan[0]


def test_what_comes_next_begins_after_all_that_was_looked_at(filled: Broker) -> None:
    chain = Chain(filled.directory / "audit")  # its first record is the broker's
    found, after = later(chain, Wanted(user="alice"), 0, 2)
    assert ([one.number for one in found], after) == ([2, 3], 3)
    found, after = later(chain, Wanted(user="alice"), after, 2)
    assert ([one.number for one in found], after) == ([4], 6)
    assert later(chain, Wanted(user="alice"), after, 2) == ([], 6)
    query, values = query_of(Wanted(), 3)
    with closing(Index(chain.segments()[0])) as index:
        assert "INTEGER PRIMARY KEY (rowid>?)" in index.rows(f"EXPLAIN QUERY PLAN {query}", *values, 20)[0][-1]
