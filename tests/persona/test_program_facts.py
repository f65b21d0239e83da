"""What is known of programs, and under which names."""

import pytest

from persona.program_facts import IN_SBIN, INTERACTIVE, PROGRAMS, PROMPTS, Kind, kinds_of

CODE = (
    "sh bash python3 python3.11 perl perl5.36.0 vim vim.basic awk mawk node nodejs php8.2 lua5.4 ruby3.1 tclsh8.6 gdb"
)
LOADS = (
    "ld.so ld-linux-x86-64.so.2 ld-musl-x86_64.so.1 valgrind qemu-x86_64 qemu-x86_64-static qemu-mips64el "
    "qemu-aarch64-static proot rr box64"
)


@pytest.mark.parametrize("name", CODE.split())
def test_programs_that_run_code(name: str) -> None:
    assert Kind.CODE in kinds_of(name)


@pytest.mark.parametrize("name", LOADS.split())
def test_programs_that_load_programs(name: str) -> None:
    assert Kind.LOADS in kinds_of(name)


@pytest.mark.parametrize("name", ["qemu-system-x86_64", "x86_64-linux-gnu-gcc-12", "gcc-12", "clang++-15"])
def test_names_with_versions_and_machines(name: str) -> None:
    assert kinds_of(name)
    assert Kind.LOADS not in kinds_of(name)


@pytest.mark.parametrize("name", ["tar", "find", "sed", "git", "rsync", "sort"])
def test_programs_that_start_others(name: str) -> None:
    assert kinds_of(name) >= {Kind.STARTS, Kind.WRITES, Kind.READS}


@pytest.mark.parametrize(("name", "kinds"), [("less", {Kind.STARTS, Kind.READS}), ("cat", {Kind.READS})])
def test_programs_that_read(name: str, kinds: set[Kind]) -> None:
    assert kinds_of(name) == kinds


@pytest.mark.parametrize("name", ["dd", "cp", "tee"])
def test_programs_that_write(name: str) -> None:
    assert kinds_of(name) >= {Kind.WRITES, Kind.READS}


@pytest.mark.parametrize(
    "name", ["ls", "true", "id", "uname", "qemu-img", "qemu-nbd", "ld.so.conf", "ldd", "", "2", "-"]
)
def test_of_these_nothing_is_known(name: str) -> None:
    assert kinds_of(name) == frozenset()


def test_the_other_lists_name_programs_that_are_listed() -> None:
    assert PROGRAMS.keys() >= IN_SBIN | INTERACTIVE | PROMPTS
