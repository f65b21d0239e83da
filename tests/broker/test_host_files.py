"""What a poller that is not trusted may leave for the broker: it costs that host's sample, and nothing else."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from persona_broker.condition_watcher import Watcher
from persona_broker.host.core.readings import Domain, DomainState
from persona_broker.host.core.sample import DOMAINS_MAX, FIGURES, HostSample, encode
from persona_broker.host.load import SetSource
from persona_broker.host.sample_files import ROUND_MAX, SIZE_MAX, SampleFiles
from persona_broker.store.sqlite import SqliteStore

NOW = 1000.0


def sample(host: str, at: float = NOW, domains_at: float | None = NOW, domains: tuple[Domain, ...] = ()) -> HostSample:
    return HostSample(host, "qemu:///system", at, {"cpu": 5.0}, domains_at, domains)


def full(host: str, count: int = DOMAINS_MAX) -> HostSample:
    """As many domains as there may be, each with all of its figures."""
    figures = dict.fromkeys(FIGURES, 1234567890.1234567)
    domains = [
        Domain(f"00000000-0000-4000-8000-{n:012}", f"domain-{n}", DomainState.RUNNING, figures) for n in range(count)
    ]
    return sample(host, domains=tuple(domains))


def listens(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(str(path))
    found.listen()
    return found


def writes(path: Path) -> int:
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def puts(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


def as_text(one: HostSample) -> str:
    return json.dumps(encode(one))


ODD: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "fifo_with_writer": writes,
    "directory": Path.mkdir,
    "socket": listens,
    "link": lambda path: path.symlink_to(path.with_name("good.json")),
    "dangling_link": lambda path: path.symlink_to("/proc/self/mem"),
    "too_large": puts(" " * (SIZE_MAX + 1)),
    "sparse": sparse,
    "deep": puts("[" * 100_000),
    "surrogate": puts(json.dumps({**encode(sample("odd")), "host": "\udcff"})),
    "digits": puts('{"at": ' + "9" * 10_000 + "}"),
    "not_utf_8": puts(b"\xff"),
    "future": puts(as_text(sample("odd", NOW + 6))),
    "far_future": puts(as_text(sample("odd", 1e18))),
    "domains_of_the_future": puts(as_text(sample("odd", NOW, NOW + 6))),
    "another_host": puts(as_text(sample("good"))),
    "escapes": puts(json.dumps({**encode(sample("odd")), "\x1b[2J\n": 1})),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_sample_costs_only_itself(tmp_path: Path, odd: str, caplog: pytest.LogCaptureFixture) -> None:
    SampleFiles(tmp_path).put(sample("good"))
    made = ODD[odd](tmp_path / "odd.json")
    try:
        reader = SampleFiles(tmp_path, ("odd", "good"), lambda: NOW)
        assert reader.news() == [sample("good")]
        before = len(os.listdir("/proc/self/fd"))
        assert [reader.news() for _ in range(20)] == [[]] * 20
        assert len(os.listdir("/proc/self/fd")) == before
        (record,) = caplog.records  # once, not at each look
        assert record.message.startswith(f"{tmp_path}/odd.json: this sample of a host does not count: ")
        assert record.message.isprintable()
    finally:
        if isinstance(made, socket.socket):
            made.close()
        elif odd == "fifo_with_writer" and isinstance(made, int):
            os.close(made)


def test_a_problem_is_said_again_once_it_was_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = SampleFiles(tmp_path, ("lab",), lambda: NOW)
    for text in ("{", "{ ", as_text(sample("lab")), "{  "):
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(tmp_path / "lab.json")
        reader.news()
    assert len(caplog.records) == 2


def test_a_clock_may_be_a_little_ahead(tmp_path: Path) -> None:
    SampleFiles(tmp_path).put(sample("lab", NOW + 4, NOW + 4))
    assert len(SampleFiles(tmp_path, ("lab",), lambda: NOW).news()) == 1


def test_the_files_of_other_names_are_not_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SampleFiles(tmp_path).put(sample("lab"))
    SampleFiles(tmp_path).put(sample("other"))
    (tmp_path / "broken.json").write_text("{")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json")).write_text(
        json.dumps({**encode(sample("lab")), "host": "\udcff"})
    )
    assert SampleFiles(tmp_path, ("lab",), lambda: NOW).news() == [sample("lab")]
    assert caplog.records == []


def test_the_largest_sample_fits_and_a_larger_one_is_not_put(tmp_path: Path) -> None:
    files = SampleFiles(tmp_path, ("lab",), lambda: NOW)
    files.put(full("lab"))
    (found,) = files.news()
    assert len(found.domains) == DOMAINS_MAX
    with pytest.raises(OSError, match="has at most"):
        files.put(sample("lab", domains=(Domain("x", "y" * SIZE_MAX, DomainState.OTHER, {}),)))
    assert files.news() == []  # the one before is still there


def test_a_round_reads_so_much_and_the_next_goes_on(tmp_path: Path) -> None:
    hosts = tuple(f"h{number}" for number in range(8))
    files = SampleFiles(tmp_path, hosts, lambda: NOW)
    for host in hosts:
        files.put(full(host, 300))  # some 100 kB
    rounds: list[list[str]] = []
    while not rounds or files.is_behind:
        rounds.append([one.host for one in files.news()])
        files.put(full("h0", 300))  # one that is always new does not keep the others away
    assert [host for hosts_of_round in rounds for host in hosts_of_round][:8] == list(hosts)
    assert all(len(one) <= 1 + ROUND_MAX // 90_000 for one in rounds)


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * ((SIZE_MAX - 8) // 3) + "[]]",
        "[" + "[]," * 30_000 + "[]]" + " " * (SIZE_MAX - 100_000),
        "[" + "0," * ((SIZE_MAX - 8) // 2) + "0]",
        "[" * 900 + "0" * (SIZE_MAX - 2000),
        as_text(full("another")),
    ],
    ids=["lists", "as_many_lists_as_pass", "numbers", "digits", "decoded"],
)
def test_a_round_takes_some_hundredths_of_a_second(tmp_path: Path, text: str) -> None:
    hosts = [f"h{number}" for number in range(64)]
    for host in hosts:
        (tmp_path / f"{host}.json").write_text(text)
    files, took_s = SampleFiles(tmp_path, hosts, lambda: NOW), []  # seconds of the processor
    for _ in range(9):
        began = time.thread_time()
        assert files.news() == [] and files.is_behind
        took_s.append(time.thread_time() - began)
    assert sorted(took_s)[4] < 0.1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "db")
    yield store
    store.close()


def test_a_thousand_names_leave_no_rows_and_the_watcher_goes_on(store: SqliteStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    now = time.time()
    store.put_hosts([(sample(f"old-{number}", 1e18), frozenset()) for number in range(100)])
    watcher = Watcher(store, SetSource(store.set_load), 15, hosts=SampleFiles(run, ("lab", "odd")))
    assert store.host_names() == []  # of names that another broker took
    os.mkfifo(run / "odd.json")
    for number in range(1000):
        SampleFiles(run).put(sample(f"name-{number}", 1e18))
    SampleFiles(run).put(sample("lab", now, now))
    watcher.look()
    watcher._hosts_at = 0.0
    watcher.look()
    assert store.host_names() == ["lab"]
