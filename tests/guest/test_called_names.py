"""One file, several programs: the name that is called decides, in every form that a caller may give it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from persona_guest.core.leases import LeaseBook
from persona_guest.gate.pending import Pending
from persona_guest.kernel.task import Task
from persona_guest.lsm.layer import HangsOn
from persona_guest.program import exec_request as exec_requests
from persona_guest.program.exec_request import ExecRequest
from persona_guest.program.identity import Identifier
from persona_guest.program.process import Running
from persona_guest.settings import Gate

from persona.called_names import by_name, called_name, siblings
from persona.codec import decode_decision, encode_decision
from persona.decisions import Decision, Granted, Lease, PersonaRef, Width
from persona.patterns import Whitelist, parse_pattern
from persona.problems import Reason
from tests.guest.conftest import Run, trial_of
from tests.guest.test_chain import directory_of_root

# --- what is one program, and what is several -------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    ["pgrep pkill", "pgrep", "sudo sudoedit", "systemctl reboot halt", "kmod lsmod", "dash sh", "bash rbash", "bash",
     "vim vi editor", "xz unxz", "foo bar", "fsck.ext3 fsck.ext4", "python3 foo", "a2 b2", "ls-2 lsblk-2", "busybox",
     "nano editor", "git", "openssl", "gzip", "rclone", "perf", "udevadm"],
)  # fmt: skip
def test_several_programs(names: str) -> None:
    assert by_name(tuple(names.split()), "file")


@pytest.mark.parametrize(
    "names",
    ["", "ls", "foo", "python3 python3.11", "perl perl5.36.0", "awk mawk nawk", "pager less", "nodejs node",
     "cc gcc gcc-12 x86_64-linux-gnu-gcc x86_64-linux-gnu-gcc-12", "c++ g++ g++-12", "ld ld.bfd x86_64-linux-gnu-ld",
     "which which.debianutils", "foo foo-1.2 foo2", "ping ping4 ping6", "nc nc.openbsd netcat"],
)  # fmt: skip
def test_one_program(names: str) -> None:
    assert not by_name(tuple(names.split()), "file")


def test_the_file_s_own_name_may_tell() -> None:
    assert by_name(("editor",), "vim.basic")
    assert by_name((), "busybox")
    assert not by_name(("editor",), "ed")


def test_a_made_up_name_is_shown_as_far_as_a_line_has_room(bin: Path) -> None:
    obstacle = attempt_of(bin, "look", "x" * 60_000).obstacles[0]
    assert obstacle is not None and "xxx" in obstacle.help
    assert decode_decision(encode_decision(obstacle)) == obstacle  # as 'persona explain' is told of it


def test_openssl_is_no_other_of_its_commands() -> None:
    """Called ``version`` it is 'openssl version', whatever its first argument says."""
    shown = subprocess.run(["version", "x509"], executable="/usr/bin/openssl", capture_output=True, text=True).stderr
    assert shown.startswith("version:")
    exec_request = attempt_of(Path("/usr/bin"), "openssl", "version", "x509", "-help")
    assert not allowed(exec_request, "openssl x509 **") and not allowed(exec_request, "**")
    assert allowed(attempt_of(Path("/usr/bin"), "openssl", "openssl", "x509", "-help"), "openssl x509 **")


def test_siblings() -> None:
    assert "pkill" in siblings("pgrep")
    assert "pgrep" not in siblings("pgrep")
    assert siblings("ls") == ()


@pytest.mark.parametrize(
    ("called", "name"),
    [("pkill", "pkill"), ("/x/pkill", "pkill"), ("./pkill", "pkill"), ("-bash", "bash"), ("-sh", "sh"), ("/-sh", "sh"),
     ("-pkill", "-pkill"), ("--bash", "--bash"), ("pkill/", ""), ("", ""), ("/", ""), ("-", "-")],
)  # fmt: skip
def test_the_name_in_what_was_called(called: str, name: str) -> None:
    assert called_name(called) == name


# --- files of a machine -----------------------------------------------------------------------------


@pytest.fixture
def bin(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A secure path: one file with two names, one with a version, one that the operator knows, a script."""
    with directory_of_root() as found:
        shutil.copy("/usr/bin/true", found / "look")
        os.link(found / "look", found / "kill")
        shutil.copy("/usr/bin/true", found / "tool-1.2")
        (found / "tool").symlink_to("tool-1.2")
        shutil.copy("/usr/bin/true", found / "one")
        (found / "other").symlink_to("one")
        (found / "zip").write_text("#!/bin/bash\n")
        (found / "zip").chmod(0o755)
        os.link(found / "zip", found / "unzipped")
        yield found


def attempt_of(bin: Path, path: str, *argv: str, same: tuple[str, ...] = ()) -> ExecRequest:
    identifier = Identifier(Gate(secure_path=(str(bin),), same_by_any_name=same))
    fd = os.open(bin / path, os.O_PATH)
    return exec_requests.request_for(
        Task(os.getpid()), fd, os.fsencode(bin / path), tuple(map(os.fsencode, argv)), identifier
    )


def allowed(exec_request: ExecRequest, *patterns: str, stage: int = 0) -> bool:
    """Whether a whitelist allows it, as broker and guest together decide."""
    if exec_request.obstacles[stage] is not None:
        return False
    question = exec_request.question(stage, 1)
    argv = tuple(map(os.fsdecode, question.argv))
    return Whitelist(tuple(map(parse_pattern, patterns))).allows(question.program, argv)


@pytest.mark.parametrize("path", ["look", "kill"])
@pytest.mark.parametrize("called", ["{}", "/x/{}", "./{}"])
def test_the_name_that_is_called_decides(bin: Path, path: str, called: str) -> None:
    look, kill = called.format("look"), called.format("kill")
    assert allowed(attempt_of(bin, path, look), "look")
    assert not allowed(attempt_of(bin, path, kill), "look")
    assert not allowed(attempt_of(bin, path, look), "kill")
    assert allowed(attempt_of(bin, path, look), f"{bin}/look")
    assert not allowed(attempt_of(bin, path, kill), f"{bin}/look")
    assert allowed(attempt_of(bin, path, look), "**", "!kill")
    assert not allowed(attempt_of(bin, path, kill), "**", "!kill")
    assert not allowed(attempt_of(bin, path, kill), "look **")
    assert not allowed(attempt_of(bin, path, look), "**", f"!{bin}/l*")


@pytest.mark.parametrize("called", ["foo", "-look", "xkillx", "look/", "", "LOOK", "killer", "tool"])
@pytest.mark.parametrize("patterns", [("look",), ("kill",), ("**",), ("**", "!kill"), ("/**",)])
def test_a_made_up_name_is_refused_whatever_is_allowed(bin: Path, called: str, patterns: tuple[str, ...]) -> None:
    found = attempt_of(bin, "look", called)
    assert not allowed(found, *patterns)
    refused = found.obstacles[0]
    assert refused is not None
    assert refused.reason is Reason.PROGRAM_NOT_TRUSTED
    assert "start it as " in refused.help
    assert "look" in refused.help


def test_no_arguments_at_all_is_a_made_up_name_too(bin: Path) -> None:
    assert attempt_of(bin, "look").obstacles[0] is not None


def test_a_carve_out_of_the_file_s_path_refuses_all_its_names(bin: Path) -> None:
    file = attempt_of(bin, "look", "kill").stages[0].found.program.path
    for name in ("look", "kill"):
        assert not allowed(attempt_of(bin, "look", name), "**", f"!{file}")


@pytest.mark.parametrize("called", ["tool", "tool-1.2", "foo", "-tool", "kill", ""])
@pytest.mark.parametrize("path", ["tool", "tool-1.2"])
def test_names_of_one_program_are_one(bin: Path, path: str, called: str) -> None:
    assert allowed(attempt_of(bin, path, called), "tool")
    assert allowed(attempt_of(bin, path, called), "tool-1.2")
    assert not allowed(attempt_of(bin, path, called), "**", "!tool")


def test_an_operator_may_say_that_names_are_of_one_program(bin: Path) -> None:
    assert not allowed(attempt_of(bin, "one", "other"), "one")
    assert allowed(attempt_of(bin, "one", "other", same=("one",)), "one")
    assert allowed(attempt_of(bin, "one", "x", same=("other",)), "one")


def test_a_script_s_name_is_its_path_and_argv0_does_not_count(bin: Path) -> None:
    assert allowed(attempt_of(bin, "zip", "unzipped"), "zip")
    assert not allowed(attempt_of(bin, "unzipped", "zip"), "zip")
    assert allowed(attempt_of(bin, "unzipped", "zip"), "unzipped")


# --- leases, the kernel, and what runs already ------------------------------------------------------


def granted(width: Width) -> Decision:
    return Granted(PersonaRef("A", 1), "p", Lease(30.0, width))


@pytest.mark.parametrize("width", list(Width))
def test_a_lease_is_for_one_name(bin: Path, width: Width) -> None:
    book, identifier = LeaseBook(), Identifier(Gate(secure_path=(str(bin),)))

    def question(path: str, *argv: str) -> object:
        fd = os.open(bin / path, os.O_PATH)
        words = tuple(map(os.fsencode, argv))
        return exec_requests.request_for(Task(os.getpid()), fd, os.fsencode(bin / path), words, identifier).question(
            0, 1
        )

    book.keep(question("look", "look"), granted(width), 0)  # type: ignore[arg-type]
    assert book.lookup(question("look", "look"), 1) is not None  # type: ignore[arg-type]
    assert book.lookup(question("look", "kill"), 1) is None  # type: ignore[arg-type]
    assert book.lookup(question("kill", "kill"), 1) is None  # type: ignore[arg-type]
    book.keep(question("zip", "x"), granted(width), 0)  # type: ignore[arg-type]
    assert book.lookup(question("unzipped", "x"), 1) is None  # type: ignore[arg-type]


def pending(found: ExecRequest) -> Pending:
    return Pending(None, 0, 0, Task(1), found)  # type: ignore[arg-type]


@pytest.mark.parametrize(("path", "hangs"), [("look", HangsOn.NAME), ("tool", HangsOn.NOTHING), ("zip", HangsOn.NAME)])
def test_the_kernel_compares_the_name_that_decided(bin: Path, path: str, hangs: HangsOn) -> None:
    found = pending(attempt_of(bin, path, path))
    wide, narrow = granted(Width.PROGRAM), granted(Width.ARGV)
    assert isinstance(wide, Granted)
    assert isinstance(narrow, Granted)
    assert found.hangs_on(wide) is hangs
    assert found.hangs_on(None) is hangs
    assert found.hangs_on(narrow) is HangsOn.ARGUMENTS


def test_what_runs_is_what_it_was_called(bin: Path) -> None:
    found = attempt_of(bin, "look", "look").stages[0].found

    def names(*argv: str) -> list[tuple[str, ...]]:
        return [program.names for program, _ in Running(((found, argv),)).trusted]

    assert names("kill") == [("kill",)]
    assert names("/x/look", "y") == [("look",)]
    assert names("foo") == names() == []  # no whitelist can vouch for it


# --- the gate itself --------------------------------------------------------------------------------

HARMLESS = "--version >/dev/null"
LOOK = {
    "pgrep": f"pgrep {HARMLESS}",
    "its path": f"/usr/bin/pgrep {HARMLESS}",
    "a path of its own with the right name": f"ln -s /usr/bin/pkill d/pgrep; d/pgrep {HARMLESS}",
    "the name, whatever file": f"(exec -a pgrep /usr/bin/pkill {HARMLESS})",
    "the dash of a login": "(exec -a -sh /bin/sh -c true)",
}
KILL = {
    "pkill": f"pkill {HARMLESS}",
    "its path": f"/usr/bin/pkill {HARMLESS}",
    "its name for the other file": f"(exec -a pkill /usr/bin/pgrep {HARMLESS})",
    "with a path": f"(exec -a /x/pkill /usr/bin/pgrep {HARMLESS})",
    "a link": f"ln -s /usr/bin/pgrep d/pkill; d/pkill {HARMLESS}",
    "a made-up name": f"(exec -a foo /usr/bin/pgrep {HARMLESS})",
    "with a dash": f"(exec -a -pgrep /usr/bin/pgrep {HARMLESS})",
    "no name": f"(exec -a '' /usr/bin/pgrep {HARMLESS})",
    "the other shell": "dash -c true",
}


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("documents") / "persona.yaml"
    path.write_text("kind: Persona\nname: Look\ncommand_whitelist: [bash, sh, pgrep, ln, mkdir, rm]\n")
    with trial_of(path) as socket:
        yield socket


def test_pgrep_is_allowed_and_pkill_is_not(gated: Run, looking: Path) -> None:
    """One file; twice, and in turn, since what was decided is leased."""
    assert os.path.samefile("/usr/bin/pgrep", "/usr/bin/pkill")
    lines = ["mkdir -p d"]
    for _ in range(2):
        for ways in (LOOK, KILL):
            lines += [f"( {line} ) 2>/dev/null && echo 'ran: {way}'; rm -f d/*" for way, line in ways.items()]
    done = gated("\n".join(lines), by=looking)
    assert set(done.stdout.splitlines()) == {f"ran: {way}" for way in LOOK}
    assert done.stdout.count("ran") == 2 * len(LOOK)


def test_a_carve_out_of_one_name_leaves_the_others(gated: Run, tmp_path: Path) -> None:
    persona = tmp_path / "ops.yaml"
    persona.write_text("kind: Persona\nname: Ops\ncommand_whitelist: ['**', '!reboot', '!pkill', '!view']\n")
    done = gated(
        "systemctl --version | head -1; pgrep --version; vi --version | head -1; python3.11 -c 'print(1)'; "
        "/usr/sbin/reboot --help; pkill --version; (exec -a x-reboot systemctl --help); "
        "(exec -a -reboot systemctl --help); (exec -a viewer vi --version); (exec -a foo python3 -c 'print(2)')",
        files=persona,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["systemd", "pgrep", "VIM", "1", "2"]
    assert [line.split()[1] for line in done.stderr.splitlines() if "denied, " in line] == [
        "reboot:", "pkill:", "systemctl:", "systemctl:", "vi:",
    ]  # fmt: skip
