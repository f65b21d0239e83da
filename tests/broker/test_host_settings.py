"""The table [host] of broker.toml: what hosts are called, and what is refused with a fix."""

import socket
from pathlib import Path

import pytest
from persona_broker import settings
from persona_broker.settings import Host, hosts_of, is_local, watched_hosts

from persona.problems import PersonaError

HERE = socket.gethostname().partition(".")[0]


@pytest.mark.parametrize(
    ("uri", "name", "local"),
    [
        ("qemu:///system", HERE, True),
        ("qemu+unix:///system?socket=/run/x", HERE, True),
        ("qemu+tls://lab-2.example/system", "lab-2", False),
        ("qemu+ssh://root@lab-3:2222/system", "lab-3", False),
        ("qemu+tls://192.0.2.7/system", "192-0-2-7", False),
        ("qemu+tls://[2001:db8::7]:16514/system", "2001-db8--7", False),
    ],
)
def test_a_host_is_called_as_the_machine_in_its_uri(uri: str, name: str, local: bool) -> None:
    assert (hosts_of(Host((uri,))), is_local(uri)) == ({name: uri}, local)


@pytest.mark.parametrize(
    ("machine", "name"),
    [("my_host.example", "my-host"), ("x" * 64, "x" * 63), ("_", "host"), ("-a", "a"), ("h\u00e4user", "h-user")],
)
def test_the_broker_starts_whatever_its_machine_is_called(
    monkeypatch: pytest.MonkeyPatch, machine: str, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    assert hosts_of(Host()) == {name: "qemu:///system"}
    assert watched_hosts(Host()) == ()
    assert watched_hosts(Host(("qemu:///x",))) == (name,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('uris = "qemu:///system"', "host.uris: expected a list"),
        ("uris = []", "expected 1 to 64"),
        ('uris = ["system"]', "'system': expected a URI of libvirt, like"),
        ('uris = ["qemu:///system", "qemu:///session"]', "is the name of two hosts; names tells them apart"),
        ('names = ["a", "b"]', "2 names for 1 URIs: expected one for each"),
        ('names = ["a b"]', "'a b' is not a valid name of a host: letters, digits and '-'"),
        ('names = ["../x"]', "is not a valid name"),
        ('names = ["a\\n"]', "is not a valid name"),  # they name files, label metrics, and stand in logs
        ('names = ["a\\""]', "is not a valid name"),
        ('names = ["\u00e4"]', "is not a valid name"),
        ('moons = ["a"]', "host.moons: unknown key; known: uris, names, directory"),
        ('directory = "run"', "host.directory: 'run': expected an absolute path"),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_do(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "broker.toml").write_text(f"[host]\n{text}\n")
    with pytest.raises(PersonaError) as error:
        settings.check(settings.load(tmp_path / "broker.toml"))
    assert why in error.value.message
