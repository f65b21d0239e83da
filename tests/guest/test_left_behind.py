"""Sessions that a machine has no more are over for its broker too: agent and broker as 'persona try' starts them."""

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from persona_broker.store.interface import SessionRow
from persona_broker.store.sqlite import SqliteStore
from persona_guest.shell import trial
from persona_guest.shell.client import Client

from persona.decisions import Subject
from tests.guest.conftest import GATED
from tests.waiting import until


def test_a_machine_that_was_installed_anew_or_let_go_leaves_no_session(documents: Path) -> None:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-")))
        store = stack.enter_context(closing(SqliteStore(home / "db")))
        for ident, guest in (("s-left", trial.VM), ("s-stray", "removed")):
            store.open_session(SessionRow(ident, guest, Subject("alice", (), guest), "sshd", "", 1.0, revoked=False))
        trial.start(stack, home, [str(documents)])
        until(lambda: store.sessions() == [])
        agent = str(home / "run" / "agent.sock")
        command = [sys.executable, "-c", GATED, agent, "/usr/bin/sleep", "60"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = stack.enter_context(subprocess.Popen(command, env=environment, start_new_session=True))
        stack.callback(lambda: os.killpg(process.pid, 9))
        until(lambda: len(store.sessions()) == 1)
        with Client(agent) as client:  # needs root, as all tests do
            # the broker knows of it first: one that is still being opened is not let go
            until(lambda: client.call("status")["sessions"] == 1)
            client.call("release")
        until(lambda: store.sessions() == [])
        assert process.poll() is None  # it goes on, ungated
