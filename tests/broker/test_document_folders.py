"""Which files of a folder are read, in which order, and what is said of those that are not."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from persona_broker.policy_files.reader import Loaded, load

from tests.broker.conftest import Broker
from tests.broker.test_documents_as_meant import GOOD, loaded


def names(found: Loaded) -> list[str]:
    return [document.name for document in found.documents]


def persona(name: str) -> str:
    return f"{{kind: Persona, name: {name}, command_whitelist: [ls]}}\n"


def test_a_lock_of_an_editor_is_not_read(cli: Broker, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "p.yaml").write_text(GOOD)
    (tmp_path / "d" / ".#p.yaml").symlink_to("ann@host.1234:1700000000")
    done = cli.run("check", str(tmp_path / "d"))
    assert (done.returncode, done.stdout) == (0, "1 document, no problems\n")
    assert cli.run("apply", str(tmp_path / "d")).stdout == "added: Persona Good\nrevision 1\n"


def test_what_editors_and_packages_leave_is_not_read_and_what_may_be_meant_is_said(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(GOOD)
    silent = ["#p.yaml#", "p.yaml~", ".p.yaml.swp", ".#x.yaml", "._p.yaml", "p.yaml.bak", "p.yaml.orig", "p.yaml.rej",
              "p.yaml.dpkg-old", "p.yaml.rpmsave", "p.yaml.tmp", "README.md", "Makefile", "4913"]  # fmt: skip
    said = ["P.YAML", "q.yaml.txt", "r.Yml", "s.JSON", "t.jsonc", ".hidden.yaml"]
    for name in silent + said:
        (tmp_path / name).write_text("!broken [")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.yaml").write_text("!broken [")
    found = load([tmp_path])
    assert (names(found), found.problems) == (["Good"], ())
    assert {item.file.rpartition("/")[2] for item in found.skipped} == set(said)


def test_a_folder_as_kubernetes_mounts_a_config_map(tmp_path: Path) -> None:
    real = tmp_path / "..2026_11_28_10_00_00.123456789"
    real.mkdir()
    (real / "p.yaml").write_text(GOOD)
    (tmp_path / "..data").symlink_to(real.name)
    (tmp_path / "p.yaml").symlink_to("..data/p.yaml")
    found = load([tmp_path])
    assert (names(found), found.problems, found.skipped) == (["Good"], (), ())


def test_folders_below_in_order_and_links_to_folders(tmp_path: Path) -> None:
    for name in ("b/x.yml", "a.yaml", "b.yaml", "b/c/y.json"):
        file = tmp_path / "d" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        document = {"kind": "Persona", "name": file.stem, "command_whitelist": []}
        file.write_text(json.dumps(document))
    (tmp_path / "d" / "b" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "link").symlink_to("d")
    found = load([tmp_path / "link"])
    assert (names(found), found.problems) == (["a", "y", "x", "b"], ())
    assert [str(item) for item in found.skipped] == [
        f"{tmp_path}/link/b/loop: skipped: a link to a folder; name it on the command line to have it read"
    ]


def test_what_is_no_file_is_named_and_nothing_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "null.yaml").symlink_to("/dev/zero")
    (tmp_path / "good.yaml").write_text(GOOD)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.yaml"))
        begun = time.monotonic()
        found = load([tmp_path, tmp_path / "fifo.yaml", Path("/dev/zero")])
    assert time.monotonic() - begun < 5
    assert names(found) == ["Good"]
    said = {str(problem).removeprefix(f"{tmp_path}/").partition(": ")[::2] for problem in found.problems}
    assert said == {
        ("fifo.yaml", "is a pipe, not a file: only files are read"),
        ("socket.yaml", "is a socket, not a file: only files are read"),
        ("null.yaml", "is a device, not a file: only files are read"),
        ("/dev/zero", "is a device, not a file: only files are read"),
        ("dangling.yaml", "No such file or directory"),
        ("loop.yaml", "Too many levels of symbolic links"),
    }


def test_a_file_that_counts_by_its_name_whatever_it_is_called(tmp_path: Path) -> None:
    assert names(loaded(tmp_path, GOOD, ".hidden")) == ["Good"]


def test_bounds_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_broker.policy_files.folders.FILES_MAX", 3)
    monkeypatch.setattr("persona_broker.policy_files.folders._ENTRIES_MAX", 6)
    for index in range(5):
        (tmp_path / f"{index}.yaml").write_text(persona(f"A{index}"))
    found = load([tmp_path])
    assert names(found) == ["A0", "A1", "A2"]
    assert "more than 3 files" in str(found.problems[0])
    for index in range(5):
        (tmp_path / f"{index}.md").touch()
    assert any("more than 6 files and folders" in str(problem) for problem in load([tmp_path]).problems)
    deep = tmp_path / "deep"
    (deep / "/".join("x" * 40)).mkdir(parents=True)
    monkeypatch.setattr("persona_broker.policy_files.folders._ENTRIES_MAX", 100)
    assert any("folders below each other" in str(problem) for problem in load([deep]).problems)


def test_bounds_of_all_files_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_broker.policy_files.reader.TOTAL_MAX", 100)
    for index in range(3):
        (tmp_path / f"{index}.yaml").write_text(persona(f"A{index}"))
    found = load([tmp_path])
    assert names(found) == ["A0"]
    assert any("all files together" in str(problem) for problem in found.problems)


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "d" / "closed").mkdir(parents=True)
    (tmp_path / "d" / "good.yaml").write_text(GOOD)
    (tmp_path / "d" / "secret.yaml").write_text(GOOD)
    (tmp_path / "d" / "secret.yaml").chmod(0)
    (tmp_path / "d" / "closed").chmod(0)
    folder = os.open(tmp_path / "d", os.O_RDONLY | os.O_DIRECTORY)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.fchdir(folder)
            if os.geteuid() == 0:  # who may read everything
                os.fchmod(folder, 0o755)
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            found = load([Path(name) for name in ("closed", "good.yaml", "secret.yaml")])
            said = sorted(map(str, found.problems))
            right = ["closed: Permission denied", "secret.yaml: Permission denied"]
            code = 0 if said == right and names(found) == ["Good"] else 2
        finally:
            os._exit(code)
    os.close(folder)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    (tmp_path / "d" / "closed").chmod(0o700)
