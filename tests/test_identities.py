"""Who is gated: one table through the PAM module, the agent, the kernel layer's rule and the health figures.

The kernel layer itself runs the same table in a guest (tests/guest_vm/test_identities.py): here its rule,
which is one header with the PAM module's, is compiled for this machine.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from persona_guest.agent import state_file
from persona_guest.core.accounts import uid_min_of
from persona_guest.core.pam_protocol import Caller, PamVerdict, reply
from persona_guest.health.rules import counts
from persona_guest.ipc.pam import PamSocket, Reply
from persona_guest.login.exemptions import exemption
from persona_guest.loop import Loop
from persona_guest.settings import Gate, Mode, Paths, Settings, load
from persona_guest.shell import login, without_agent
from persona_guest.shell.client import UNREACHABLE, AgentError
from persona_guest.shell.without_agent import Why, why_let_in

from tests.identities import BREAK_GLASS, BREAK_GLASS_GID, TABLE, UID_MIN, Identity

ROOT = Path(__file__).parents[1]
MODULE = ROOT / "guest" / "pam" / "pam_persona.so"
SUCCESS, PERM_DENIED, AUTHINFO_UNAVAIL = 0, 6, 9
PRIMARY_GID = 65_533
GATE = Gate(uid_min=UID_MIN, break_glass_group=BREAK_GLASS)
ROWS = {f"row{number}": row for number, row in enumerate(TABLE)}


class Agent:
    """The agent's own socket and its own exemptions; what it does with who is left is ``deny``."""

    def __init__(self, path: Path) -> None:
        self.asked: dict[str, Caller] = {}
        self._loop = Loop()
        self._socket = PamSocket(self._loop, path, self)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()

    def account(self, caller: Caller, pid: int, reply: Reply) -> None:
        self.asked[caller.user] = caller
        passes = exemption(caller.uid, caller.groups, GATE)
        reply(_answer(PamVerdict.PASS if passes else PamVerdict.DENY, "gated"))

    def open(self, caller: Caller, pid: int, reply: Reply) -> str | None:
        raise NotImplementedError

    def listener(self, session: str, fd: int, reply: Reply) -> None:
        raise NotImplementedError

    def present(self, pid: int, session: str, reply: Reply) -> None:
        raise NotImplementedError

    def abandoned(self, session: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._socket.close()


_answer = reply


class Machine:
    """A user database with the table's accounts in it, seen by what ``within`` starts alone; a PAM stack."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.etc = directory / "etc"
        self.etc.mkdir()
        self.socket = directory / "pam.sock"
        self._settings = Settings(gate=GATE, paths=Paths(state_dir=str(directory)))
        members: dict[tuple[int, str], list[str]] = {(BREAK_GLASS_GID, BREAK_GLASS): []}
        users = []
        for user, (who, _) in ROWS.items():
            users.append(f"{user}:x:{who.uid}:{PRIMARY_GID}::/:/bin/sh\n")
            for group in who.group_names().items():
                members.setdefault(group, []).append(user)
        groups = [f"{name}:x:{gid}:{','.join(of)}\n" for (gid, name), of in members.items()]
        # the last row of a number is whom that number finds: it has the most groups
        (self.etc / "passwd").write_text("".join(reversed(users)) + "root:x:0:0::/root:/bin/sh\n")
        (self.etc / "group").write_text(f"root:x:0:\nprimary:x:{PRIMARY_GID}:\n" + "".join(groups))
        self.login_defs = directory / "login.defs"
        subprocess.run(["make", "-s", "-C", str(MODULE.parent)], check=True, timeout=120)

    def enforces(self, yes: bool) -> None:
        """As the agent leaves it behind."""
        state_file.write(Settings(Mode.ENFORCE if yes else Mode.COMPLAIN, gate=GATE, paths=self._settings.paths))

    def within(self, *argv: str) -> str:
        # over the whole directory: a mount over a file goes when somebody, such as useradd, puts another in its place
        script = 'mount -t overlay -o lowerdir="$1:/etc" overlay /etc && shift && exec "$@"'
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", str(self.etc), *argv],
            capture_output=True, text=True, check=True, timeout=300,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "guest")))},
        ).stdout  # fmt: skip

    def accounts(self, timeout_ms: int = 20_000, users: Iterable[str] = ROWS) -> dict[str, int]:
        """What PAM's account stage says of each."""
        options = f"state={self.directory}/gate.state login_defs={self.login_defs} timeout={timeout_ms}"
        line = f"account [success=ok default=bad] {MODULE} socket={self.socket} {options}\n"
        (self.directory / "test").write_text(line)
        drive = str(ROOT / "tests" / "pam" / "drive.py")
        lines = self.within(sys.executable, drive, str(self.directory), "test", ",".join(users), "account").splitlines()
        return {user: json.loads(line)["account"] for user, line in zip(users, lines, strict=True)}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("identities"))


@pytest.fixture
def agent(machine: Machine) -> Iterator[Agent]:
    agent = Agent(machine.socket)
    yield agent
    agent.close()


def wrong(found: Callable[[str, Identity], object], right: Callable[[bool], object]) -> dict[Identity, object]:
    return {who: said for user, (who, gated) in ROWS.items() if (said := found(user, who)) != right(gated)}


@pytest.mark.root
@pytest.mark.parametrize("enforce", [True, False])
def test_pam_with_an_agent(machine: Machine, agent: Agent, enforce: bool) -> None:
    machine.enforces(enforce)
    said = machine.accounts()
    # a refusal is one whatever the state file says, which may be old: an agent in complain mode has none
    assert wrong(lambda user, _who: said[user], lambda gated: PERM_DENIED if gated else SUCCESS) == {}
    # the agent hears of who is gated and of who breaks glass, and nobody's groups are cut
    for user, (who, gated) in ROWS.items():
        assert (user in agent.asked) == (gated or who.break_glass), who
        if gated:
            names = {name for name in who.group_names().values() if len(name) <= 255}
            assert set(agent.asked[user].groups) == names | {"primary"}, who


@pytest.mark.long
@pytest.mark.root
@pytest.mark.parametrize("enforce", [True, False])
def test_pam_without_an_agent(machine: Machine, enforce: bool) -> None:
    machine.enforces(enforce)
    machine.socket.unlink(missing_ok=True)
    said = machine.accounts(timeout_ms=300)
    refused = AUTHINFO_UNAVAIL if enforce else SUCCESS
    assert wrong(lambda user, _who: said[user], lambda gated: refused if gated else SUCCESS) == {}


@pytest.mark.root
def test_what_persona_shell_is_known_as(machine: Machine) -> None:
    script = (
        "import json, sys\nfrom persona_guest.system.accounts import caller_of\n"
        "print(json.dumps({uid: caller_of(uid).groups for uid in map(int, sys.argv[1:])}))"
    )
    uids = {who.uid: who for who, _ in TABLE}
    assert max(who.groups for who in uids.values()) > 500
    found = json.loads(machine.within(sys.executable, "-c", script, *map(str, uids)))
    for uid, who in uids.items():
        assert set(found[str(uid)]) == {*who.group_names().values(), "primary"}


@pytest.mark.parametrize("enforce", [True, False])
def test_persona_shell_without_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enforce: bool) -> None:
    said: list[str] = []
    monkeypatch.setattr("grp.getgrnam", lambda name: SimpleNamespace(gr_gid={BREAK_GLASS: BREAK_GLASS_GID}[name]))
    monkeypatch.setattr("syslog.syslog", lambda _level, line: said.append(line))
    state_file.write(
        Settings(Mode.ENFORCE if enforce else Mode.COMPLAIN, gate=GATE, paths=Paths(state_dir=str(tmp_path)))
    )

    def found(_user: str, who: Identity) -> bool:
        return why_let_in(who.uid, [PRIMARY_GID, *who.gids()], tmp_path / "gate.state") is not None

    assert wrong(found, lambda gated: not (gated and enforce)) == {}
    assert len(said) == sum(who.break_glass for who, _ in TABLE)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (None, Why.COMPLAIN), ("mode=complain\n", Why.COMPLAIN), ("mode=enforce\n", None), ("", None),
        ("rubbish", None), ("mode=complain\nuid_min=-1\n", None), ("mode=complain\nuid_min=99999999999\n", None),
        ("mode=complain\nx=1\n", None), ("mode=complain\n" + "#" * 600, None),
        ("mode=enforce\nuid_min=1002\n", Why.NEVER_GATED),
    ],
)  # fmt: skip
def test_what_persona_shell_reads_of_what_the_agent_left(tmp_path: Path, state: str | None, why: Why | None) -> None:
    if state is not None:
        (tmp_path / "gate.state").write_text(state)
    assert why_let_in(1001, [1001], tmp_path / "gate.state") == why


@pytest.mark.parametrize(
    ("code", "why", "became"),
    [(UNREACHABLE, Why.BREAK_GLASS, True), (UNREACHABLE, None, False), ("gate_failed", Why.BREAK_GLASS, False)],
)
def test_persona_shell_goes_on_only_where_nothing_was_put_up(
    monkeypatch: pytest.MonkeyPatch, code: str, why: Why | None, became: bool
) -> None:
    def install(_path: str, _shell: str) -> None:
        raise AgentError(code, "no")

    monkeypatch.setattr(login, "install", install)
    monkeypatch.setattr(without_agent, "why_let_in", lambda _uid, _gids: why)
    monkeypatch.setattr(login, "become", lambda _shell, _rest, login: 0)
    assert login.main(["-persona-shell"]) == (0 if became else login.REFUSED)


def test_the_agent() -> None:
    def found(_user: str, who: Identity) -> bool:
        return exemption(who.uid, ("users", *who.group_names().values()), GATE) is None

    assert wrong(found, lambda gated: gated) == {}


def test_a_trial_gates_whoever_starts_it() -> None:
    trial = Gate(never_gate_root=False, uid_min=0)
    assert [exemption(who.uid, (), trial) for who, _ in TABLE if not who.break_glass and not who.groups] == [None] * 39


def test_the_rule_of_the_kernel_layer_and_the_module(tmp_path: Path) -> None:
    source = (
        '#include <stdio.h>\n#include <stdlib.h>\n#include "accounts.h"\nint main(int argc, char **argv)\n{\n'
        "\tfor (int i = 1; i < argc; i++)\n"
        f'\t\tprintf("%d\\n", is_root_or_system(strtoul(argv[i], 0, 10), {UID_MIN}));\n'
        "\treturn 0;\n}\n"
    )
    (tmp_path / "rule.c").write_text(source)
    rule = str(tmp_path / "rule")
    include = str(ROOT / "guest" / "include")
    subprocess.run(["cc", "-Wall", "-Werror", f"-I{include}", "-o", rule, f"{rule}.c"], check=True, timeout=60)
    rows = [(who.uid, gated) for who, gated in TABLE if not who.break_glass]
    done = subprocess.run(
        [rule, *(str(uid) for uid, _ in rows)], capture_output=True, text=True, check=True, timeout=20
    )
    assert [(uid, line == "0") for (uid, _), line in zip(rows, done.stdout.split(), strict=True)] == rows


@pytest.mark.parametrize("field", ["COREDUMP_UID", "_UID", "_AUDIT_LOGINUID"])
def test_the_health_figures(field: str) -> None:
    entry = {"SYSLOG_IDENTIFIER": "systemd-coredump", "MESSAGE": "Process 7 (sleep) dumped core."}
    rows = [
        (who.uid, gated) for who, gated in TABLE if not who.break_glass
    ]  # who breaks glass is a person all the same
    assert [(uid, not counts({**entry, field: str(uid)}, UID_MIN)) for uid, _ in rows] == rows
    assert counts({**entry, field: "4294967295"}, UID_MIN)  # no login


@pytest.mark.parametrize(
    ("text", "uid_min"),
    [
        ("UID_MIN\t\t\t 1000\n", 1000), ("UID_MIN 500\nSYS_UID_MIN 100\n", 500), ("#UID_MIN 500\n", 1000), ("", 1000),
        ("UID_MIN 0x3e9\n", 1001), ("UID_MIN 01750\n", 1000), ("UID_MIN 5\nUID_MIN 2000\n", 2000), ("UID_MIN\n", 1000),
        ("UID_MIN -5\n", 1000), ("UID_MIN many\n", 1000), ("UID_MIN 1_0\n", 1000), ("UID_MIN 99999999999\n", 1000),
        ("UID_MIN 0b101\n", 1000), ("UID_MIN 0o17\n", 1000), ("UID_MIN 09\n", 1000), ("UID_MIN +500\n", 500),
        ("UID_MIN \u0665\u0660\u0660\n", 1000), ("UID_MIN 0\n", 0), ("#\u00a0\x85UID_MIN 0\n", 1000),
        ("#\rUID_MIN 0\n", 1000), ("# x\x0cUID_MIN 0\n", 1000),
    ],
)  # fmt: skip
def test_uid_min_of_login_defs(text: str, uid_min: int) -> None:
    assert uid_min_of(text.encode()) == uid_min


def test_guest_toml_goes_before_login_defs(tmp_path: Path) -> None:
    login_defs, toml = tmp_path / "login.defs", tmp_path / "guest.toml"
    assert load(toml, login_defs).gate.uid_min == 1000
    login_defs.write_text("UID_MIN 500\n")
    assert load(toml, login_defs).gate.uid_min == 500
    toml.write_text('mode = "enforce"\n')
    assert load(toml, login_defs).gate.uid_min == 500
    toml.write_text("[gate]\nuid_min = 2000\n")
    assert load(toml, login_defs).gate.uid_min == 2000


@pytest.mark.root
@pytest.mark.parametrize(("login_defs", "result"), [("UID_MIN 1000", AUTHINFO_UNAVAIL), ("UID_MIN 1002", SUCCESS)])
def test_the_module_goes_by_login_defs_where_the_agent_left_nothing_usable(
    machine: Machine, login_defs: str, result: int
) -> None:
    machine.login_defs.write_text(f"{login_defs}\n")
    (machine.directory / "gate.state").write_text("mode=perhaps\n")
    machine.socket.unlink(missing_ok=True)
    user = next(user for user, (who, _) in ROWS.items() if who == Identity(1001))
    assert machine.accounts(timeout_ms=300, users=[user]) == {user: result}
