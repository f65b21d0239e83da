"""What is allowed speaks for the files that come after it only where those are the machine's own.

The script is allowed, its interpreter by itself is not; ``strace`` stands for the program that nobody may run.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.core.leases import Question
from persona_guest.kernel.task import Task
from persona_guest.program import exec_request as exec_requests
from persona_guest.program.exec_request import ExecRequest
from persona_guest.program.identity import Identified, Identifier
from persona_guest.settings import Gate

from tests.guest.conftest import Run, trial_of

LOADER = "/lib64/ld-linux-x86-64.so.2"
# no C library: that would not survive being started as a loader
STATIC = r"""
void _start(void)
{
	__asm__ volatile("syscall" : : "a"(1L), "D"(1L), "S"("REPLACED\n"), "d"(9L) : "rcx", "r11", "memory");
	__asm__ volatile("syscall" : : "a"(231L), "D"(0L) : "rcx", "r11");
}
"""
ALLOWED = ["unshare", "mount", "cp", "ln", "chmod", "/usr/sbin/chroot", "mkdir", "cat", "rm"]


@pytest.fixture
def roots() -> Iterator[Path]:
    with directory_of_root() as found:
        yield found


@contextlib.contextmanager
def directory_of_root() -> Iterator[Path]:
    """A directory that root alone can change, its parents included."""
    with tempfile.TemporaryDirectory(dir=Path.home(), prefix="chain-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def tools() -> Iterator[Path]:
    with directory_of_root() as found:
        yield fill(found)


@pytest.fixture(scope="module")
def chain_agent(tools: Path) -> Iterator[Path]:
    with trial_of(tools / "persona.yaml") as socket:
        yield socket


def fill(roots: Path) -> Path:
    """``script``, its interpreter ``shell``, and ``replaced``, which starts by itself and as a loader."""
    shutil.copy("/usr/bin/dash", roots / "shell")
    (roots / "script").write_text(f"#!{roots}/shell\necho SCRIPT\n")
    (roots / "nested").write_text(f"#!{roots}/script\n")
    for name in ("script", "nested"):
        (roots / name).chmod(0o755)
    (roots / "replaced.c").write_text(STATIC)
    subprocess.run(
        ["cc", "-O2", "-w", "-nostdlib", "-static-pie", "-o", str(roots / "replaced"), str(roots / "replaced.c")],
        check=True,
        timeout=60,
    )
    listed = "".join(f"  - {name!r}\n" for name in (*ALLOWED, f"{roots}/script", f"{roots}/nested"))
    (roots / "persona.yaml").write_text(f"kind: Persona\nname: T\ncommand_whitelist:\n{listed}")
    return roots


WAYS = {
    "the interpreter": "unshare -m bash -c 'mount --bind {replaced} {dir}/shell && {dir}/script'",
    "the interpreter of an interpreter": "unshare -m bash -c 'mount --bind {replaced} {dir}/shell && {dir}/nested'",
    "the interpreter in a root of its own": "mkdir -p r{dir}; cp {replaced} r{dir}/shell; cp {dir}/script r{dir}/; "
    "unshare -m bash -c 'mount --bind {dir} r{dir}; mount --bind {replaced} r{dir}/shell; "
    "/usr/sbin/chroot r {dir}/script'",
    "the loader": "unshare -m bash -c 'mount --bind {replaced} {loader} && /usr/bin/cat /etc/hostname'",
    "the loader of the interpreter": "unshare -m bash -c 'mount --bind {replaced} {loader} && {dir}/script'",
    "the loader of the shell": "unshare -m bash -c 'mount --bind {replaced} {loader} && exec /bin/bash -c true'",
    "a script in a mount of its own": "printf '#!%s\\necho REPLACED\\n' {dir}/shell >x; chmod 755 x; "
    "unshare -m bash -c 'mount --bind x {dir}/script && {dir}/script'",
    "a script in other mounts": "unshare -m bash -c '{dir}/script'",
    "a script in a user namespace, where its root may be changed later": "unshare -U {dir}/script",
    "a link to the script": "ln -s {dir}/script x; ./x; $PWD/x",
    "a relative path": "cd {dir}; ./script",
    "a descriptor": "exec 5<{dir}/script; /dev/fd/5; /proc/self/fd/5",
    "a directory of one's own": "mkdir d; ln -s {dir} d/l; $PWD/d/l/script",
}


@pytest.mark.parametrize("way", WAYS)
def test_no_other_file_of_the_chain_starts(gated: Run, chain_agent: Path, tools: Path, way: str) -> None:
    line = WAYS[way].format(dir=tools, replaced=tools / "replaced", loader=os.path.realpath(LOADER))
    done = gated(line, by=chain_agent)
    assert "REPLACED" not in done.stdout
    assert "SCRIPT" not in done.stdout
    assert "denied" in done.stderr or "symbolic links" in done.stderr, done.stderr


def test_every_way_leads_somewhere_without_a_gate(tools: Path, tmp_path: Path) -> None:
    for number, (way, line) in enumerate(WAYS.items()):
        home = tmp_path / str(number)
        home.mkdir()
        words = line.format(dir=tools, replaced=tools / "replaced", loader=os.path.realpath(LOADER))
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, cwd=home, timeout=60, check=False)
        assert "REPLACED" in done.stdout or "SCRIPT" in done.stdout, (way, done)


def test_what_is_allowed_starts(gated: Run, chain_agent: Path, tools: Path) -> None:
    line = f"{tools}/script; {tools}/nested; PATH={tools}:$PATH; script"
    done = gated(line, by=chain_agent)
    assert (done.stdout, done.stderr) == ("SCRIPT\n" * 3, "")


def test_where_the_interpreter_is_allowed_any_path_will_do(gated: Run, tools: Path) -> None:
    persona = tools / "wider.yaml"
    persona.write_text(f"{(tools / 'persona.yaml').read_text()}  - {tools}/shell\n")
    done = gated(f"cd {tools}; ./script; ln -s $PWD/script /tmp/$$; /tmp/$$; rm /tmp/$$", files=persona)
    assert (done.stdout, done.stderr) == ("SCRIPT\nSCRIPT\n", "")


@pytest.mark.long
def test_a_loader_is_nobody_s_program(gated: Run, tools: Path) -> None:
    persona = tools / "loader.yaml"
    persona.write_text("kind: Persona\nname: T\ncommand_whitelist: ['/usr/bin/*', '/usr/lib/x86_64-linux-gnu/*']\n")
    done = gated(f"/usr/bin/ld.so /usr/bin/strace -V; {LOADER} /usr/bin/strace -V", files=persona)
    assert done.stdout == ""
    assert done.stderr.count("denied, no_matching_policy") == 2
    shutil.copy(os.path.realpath(LOADER), tools / "renamed")
    persona.write_text(f"kind: Persona\nname: T\ncommand_whitelist: ['{tools}/*']\n")
    assert gated(f"{tools}/renamed /usr/bin/strace -V", files=persona).stdout == ""
    persona.write_text(f"kind: Persona\nname: T\ncommand_whitelist: [{tools}/renamed]\n")
    assert "strace" in gated(f"{tools}/renamed /usr/bin/strace -V", files=persona).stdout


# --- a decision is for one state of one file ------------------------------------------------------


def look(identifier: Identifier, path: Path) -> ExecRequest:
    return exec_requests.request_for(
        Task(os.getpid()), os.open(path, os.O_PATH), os.fsencode(path), (b"x",), identifier
    )


def identify(identifier: Identifier, path: Path) -> Identified:
    return look(identifier, path).stages[0].found


def question(identifier: Identifier, path: Path) -> Question:
    return look(identifier, path).question(0, 1)


@pytest.fixture
def program(roots: Path) -> Path:
    """A program outside of the secure path."""
    shutil.copy("/usr/bin/true", roots / "program")
    return roots / "program"


def test_a_file_that_did_not_change_stays_the_same(program: Path) -> None:
    identifier = Identifier(Gate())
    first = question(identifier, program)
    assert question(identifier, program) == first
    identifier.rescan()
    assert question(identifier, program) == first
    identifier.rescan()
    identifier.rescan()  # a scan in which it was not looked at
    assert question(identifier, program).file >= first.file


def test_a_number_that_was_given_to_another_file_is_another_file(program: Path) -> None:
    identifier = Identifier(Gate())
    first = identify(identifier, program)
    for _ in range(2000):
        program.unlink()
        shutil.copy("/usr/bin/false", program)
        if program.stat().st_ino == first.image.inode:
            break
    else:
        pytest.fail("this file system gave the number to nobody else, so nothing was shown")
    second = identify(identifier, program)
    assert second.image == first.image
    assert second.version != first.version


@pytest.mark.parametrize("change", ["rewritten", "renamed", "mode", "owner"])
def test_a_file_that_changed_is_another_file(program: Path, change: str) -> None:
    identifier = Identifier(Gate())
    first = identify(identifier, program)
    if change == "rewritten":
        with program.open("r+b") as file:
            file.write(b"#!/bin/sh\n")
    elif change == "renamed":
        program = program.rename(program.with_name("other"))
    elif change == "mode":
        program.chmod(0o777)
    else:
        os.chown(program, 65534, 65534)
    assert identify(identifier, program).version != first.version


def test_a_program_whose_directory_became_writable_is_not_trusted_any_more(program: Path) -> None:
    identifier = Identifier(Gate())
    first = identify(identifier, program)
    assert first.trusted
    program.parent.chmod(0o777)
    identifier.refresh(0.0)
    second = identify(identifier, program)
    assert not second.trusted
    assert second.version != first.version


def test_what_a_user_s_many_files_push_out_keeps_its_version(
    roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_guest.program.identity._CACHE_MAX", 4)
    identifier = Identifier(Gate())
    first = identify(identifier, Path("/usr/bin/true")).version
    for number in range(40):
        shutil.copy("/usr/bin/false", tmp_path / str(number))
        assert not identify(identifier, tmp_path / str(number)).trusted
    assert identify(identifier, Path("/usr/bin/true")).version == first


def test_below_a_directory_of_a_user_s_nothing_is_looked_at_again(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mount of theirs, whose server answers when they like."""
    below = roots / "theirs" / "mount"
    below.mkdir(parents=True)
    shutil.copy("/usr/bin/true", below / "program")
    os.chown(roots / "theirs", 65534, 65534)
    identifier = Identifier(Gate())
    assert not identify(identifier, below / "program").trusted
    asked: list[str] = []
    monkeypatch.setattr("persona_guest.program.identity._directory", asked.append)
    identifier.refresh(0.0)
    assert [name for name in asked if "theirs" in name] == []


def test_a_full_cache_forgets_no_directory_of_what_it_takes_up(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_guest.program.identity._CACHE_MAX", 1)
    identifier = Identifier(Gate())
    identify(identifier, Path("/usr/bin/true"))
    assert identify(identifier, program).trusted
    program.parent.chmod(0o777)
    identifier.refresh(0.0)
    assert not identify(identifier, program).trusted


def test_a_program_of_root_s_in_a_directory_of_others_has_no_fixed_path(program: Path) -> None:
    identifier = Identifier(Gate())
    assert identifier.is_fixed(os.fsencode(program))
    (program.parent / "link").symlink_to(program)
    assert identifier.is_fixed(os.fsencode(program.parent / "link"))
    os.lchown(program.parent / "link", 65534, 65534)
    assert not identifier.is_fixed(os.fsencode(program.parent / "link"))
    assert not identifier.is_fixed(b"/proc/self/exe")
    assert not identifier.is_fixed(b"/dev/fd/0")
    assert not identifier.is_fixed(b"usr/bin/true")
    program.parent.chmod(0o1777)
    assert not identifier.is_fixed(os.fsencode(program))


@pytest.mark.parametrize(
    ("pattern", "trusted"),
    [("{}/*", True), ("{}/progra?", True), ("{above}/*", False), ("{above}/**", True), ("{above}/*/program", True)],
)
def test_what_an_operator_vouches_for_has_the_wildcards_of_whitelists(
    program: Path, pattern: str, trusted: bool
) -> None:
    program.chmod(0o777)
    directory = program.parent
    gate = Gate(trusted_writable=(pattern.format(directory, above=directory.parent),))
    assert identify(Identifier(gate), program).trusted is trusted


def test_machinery_has_them_too() -> None:
    assert Gate().is_plumbing("/usr/lib/systemd/user-generators/x")
    assert not Gate().is_plumbing("/usr/lib/systemd/user-generators/x/y")
