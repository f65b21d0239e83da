"""What the other guest tests rely on: a guest that is put back, and nothing left behind; and ``scripts/lab`` itself."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guest_vm import demo, lab
from tests.guest_vm.login import shown
from tests.guest_vm.machine import Machine, process_of
from tests.guest_vm.site import ROOT, Broker, await_connected, configure


def test_a_thawed_guest_is_as_it_was_frozen_and_knows_the_time(guest: Machine, broker: Broker) -> None:
    guest.must("touch /root/trace; apt-get remove -y -q persona-guest", timeout=300)
    guest.thaw()
    configure(guest, broker)
    assert guest.root("test -e /root/trace").code == 1
    assert abs(float(guest.must("date +%s")) - time.time()) < 5
    assert guest.ssh("alice", "nmap --version").code == 126
    assert guest.ssh("alice", "ls -d /etc").out == "/etc\n"
    await_connected(guest)


def test_a_pid_file_whose_number_is_anothers_names_nobody(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    assert process_of(pidfile) is None
    pidfile.write_text(str(os.getpid()))
    assert process_of(pidfile) is None  # lives, but nothing in its command line says that it is ours
    tell_and_wait = [sys.executable, "-c", "print(flush=True); input()", str(tmp_path)]
    with subprocess.Popen(tell_and_wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ours:
        if ours.stdout is not None:
            ours.stdout.readline()  # it has executed its program
        pidfile.write_text(str(ours.pid))
        assert process_of(pidfile) == ours.pid
        ours.communicate(b"\n")
    assert process_of(pidfile) is None


def test_what_a_terminal_shows() -> None:
    typed = "\x1b[?2004h\x1b]0;alice@host: ~\x07alice$ ls\r\n\x1b[0m\x1b[01;34metc\x1b[0m\r\n\x07"
    assert shown(typed) == "alice$ ls\netc\n"


HELP = ["demo --help", "demo -h", "lab --help", "lab -h", "build-debs --help", "build-debs -h"]
MISTAKES = [
    "demo --halp", "demo --stop --stop", "demo --stop --help", "build-debs --all", "build-debs --install-deps --help",
    "lab", "lab restart", "lab start now", "lab start --help", "lab stop --help", "lab ssh", "lab load",
]  # fmt: skip


@pytest.mark.parametrize(("line", "code"), [*((line, 0) for line in HELP), *((line, 2) for line in MISTAKES)])
def test_a_script_that_is_asked_or_misunderstood_says_its_usage_and_does_nothing(
    tmp_path: Path, line: str, code: int
) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")  # there is nothing beside it that it could build or boot
    (tmp_path / "build/debs").mkdir(parents=True)
    done = _script(line, tmp_path, tmp_path)
    usage, other = (done.stderr, done.stdout) if code else (done.stdout, done.stderr)
    assert (done.returncode, other) == (code, "")
    assert usage.startswith(f"usage: scripts/{line.split()[0]} ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "scripts"]


def test_a_usage_that_nobody_can_read_starts_nothing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for script in ("demo", "lab", "build-debs"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [tmp_path / "scripts" / script, "-h"], stdout=full, stderr=subprocess.PIPE, timeout=60
            )
        assert done.returncode != 0
        assert b"persona" not in done.stderr and b"git" not in done.stderr


def _script(line: str, checkout: Path, cache: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    script, *words = line.split()
    environment = {**os.environ, "PERSONA_CACHE": str(cache)}
    argv = [str(checkout / "scripts" / script), *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, cwd=cwd)


def test_one_that_is_starting_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path))
    started: list[bool] = []

    def start() -> tuple[Machine, Broker]:
        started.append(True)
        raise RuntimeError("it does not come up")

    monkeypatch.setattr(lab, "start", start)
    with lab.alone():
        assert lab.main(["start"]) == 1
        assert demo.main([]) == 1
        assert demo.main(["--stop"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"another lab or demo is just starting (process {os.getpid()}, {tmp_path}/lab);"
        " wait, or set PERSONA_CACHE to another directory"
    ] * 3  # fmt: skip
    assert started == []
    for main, words in ((lab.main, ["start"]), (demo.main, [])):  # each holds it while it starts, and no longer
        with pytest.raises(RuntimeError):
            main(words)
    assert started == [True, True]


def test_a_lab_is_started_and_a_demo_played_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path))
    held: list[str] = []

    def hold(what: str) -> None:
        with pytest.raises(lab.BusyError), lab.alone():
            pass
        held.append(what)

    def start() -> tuple[Machine, Broker]:
        hold("start")
        return Machine.attach(tmp_path, 0), Broker.attach(tmp_path)

    def tell(machine: Machine, broker: Broker) -> demo.Story:
        hold("tell")
        return demo.Story(machine)

    monkeypatch.setattr(lab, "start", start)
    monkeypatch.setattr(demo, "tell", tell)
    assert (lab.main(["start"]), demo.main([])) == (0, 0)
    assert held == ["start", "start", "tell"]
    with lab.alone():  # and after it no longer
        pass


@pytest.mark.parametrize("load", ["abc", "182", "-1", "nan", "inf", ""])
def test_a_load_that_is_none_is_said(load: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.main(["load", load]) == 2
    assert f"'{load}' is no load, give a number from 0 to 100" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["load", "82"], ["broker", "load", "show"], ["status"], ["ssh", "alice"]])
def test_without_a_lab_it_says_how_to_start_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path))
    assert lab.main(words) == 1
    assert capsys.readouterr().err == "no lab is running: scripts/lab start\n"


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="the scripts want to be root")
def test_the_documents_of_the_guide_are_applied_from_where_the_user_is(tmp_path: Path) -> None:
    record = Broker(tmp_path / "lab/broker")
    (tmp_path / "lab/state.json").write_text('{"ssh": 1}')
    user = tmp_path / "user"
    user.mkdir()
    guide = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/lab.md").read_text(), re.DOTALL)
    assert guide is not None
    (user / "my.yaml").write_text(guide.group(1))
    (user / "examples").symlink_to(ROOT / "examples")
    (user / "yaml.py").write_text("raise SystemExit('imported from where the user is')")

    def broker(line: str) -> subprocess.CompletedProcess[str]:
        return _script(f"lab broker {line}", ROOT, tmp_path, cwd=user)

    assert broker("apply examples").returncode == 0
    applied = broker("apply my.yaml")
    assert applied.returncode == 0, applied.stderr
    assert "Reader" in record.run("explain", "--user", "bob", "--vm", "analytics-1", "--load", "cpu=30", "ls")
    explained = broker("explain --user bob --vm analytics-1 --load cpu=90 -- ls")
    assert (explained.returncode, "load_exceeds_threshold" in explained.stdout) == (1, True), explained
    assert _script("lab load 90", ROOT, tmp_path).returncode == 0
    missing = broker("apply none.yaml")
    assert missing.returncode in (1, 3)
    assert "none.yaml" in missing.stdout + missing.stderr
    assert broker("").returncode == 2
