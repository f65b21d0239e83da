"""How an agent ends: each part in its turn, whatever another one raises."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from persona_guest.agent.ends import Ends

from tests.guest.conftest import ROOT
from tests.waiting import until


def test_whatever_one_end_raises_the_others_come(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    def broken() -> None:
        raise AttributeError("no shutdown")

    with Ends() as ends:
        ends.add("the first", lambda: ended.append("first"))
        ends.add("the broken", broken)
        ends.add("the last", lambda: ended.append("last"))
    assert ended == ["last", "first"]
    assert "the broken did not end as it should" in caplog.text
    assert "no shutdown" in caplog.text


def test_what_ends_the_agent_itself_is_not_hidden() -> None:
    ended: list[str] = []
    with pytest.raises(KeyError), Ends() as ends:
        ends.add("one", lambda: ended.append("one"))
        raise KeyError("unforeseen")
    assert ended == ["one"]


# An agent whose link cannot be closed; its journal goes to a file.
BROKEN = """
import os, sys
from persona_guest import __main__ as agent
from persona_guest.broker.pool import Pool
from persona_guest.audit.journal import Journal
def fail(*_): raise AttributeError("'NoneType' object has no attribute 'shutdown'")
Pool.close = fail
flush = Journal.flush
def flushed(self):
    open(sys.argv[1], "a").write("flushed\\n"); flush(self)
Journal.flush = flushed
sys.exit(agent.main(["--config", sys.argv[2]]))
"""


def test_an_agent_whose_link_does_not_close_writes_down_everything(tmp_path: Path) -> None:
    config = tmp_path / "guest.toml"
    config.write_text(
        f'mode = "complain"\n[paths]\nruntime_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/lib"\n'
        'bpf_dir = ""\ncgroup_root = ""\n'
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "guest"))
    words = [sys.executable, "-c", BROKEN, str(tmp_path / "journal"), str(config)]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True) as process:
        run = tmp_path / "run"
        until(lambda: (run / "agent.sock").exists() and not (run / "state" / "starting").exists(), 60)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
    assert "the link to the broker did not end as it should" in said
    assert (tmp_path / "journal").read_text() == "flushed\n"
