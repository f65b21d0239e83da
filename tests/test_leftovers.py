"""A test that leaves something behind fails, and says what."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
TESTS = """
import os, subprocess, threading, time
KEPT = []
def test_descriptor():
    KEPT.append(os.open("/etc/hostname", os.O_RDONLY))
def test_child():
    KEPT.append(subprocess.Popen(["sleep", "60"]))
def test_ended_child():
    KEPT.append(os.waitid(os.P_PID, os.spawnlp(os.P_NOWAIT, "true", "true"), os.WEXITED | os.WNOWAIT))
def test_thread():
    KEPT.append(threading.Thread(target=time.sleep, args=(30,), daemon=True))
    KEPT[-1].start()
def test_nothing():
    with open("/etc/hostname"), subprocess.Popen(["true"]):
        pass
"""
TOLD = ["descriptor [0-9]*: /etc/hostname", "child [0-9]*: sleep 60", "child [0-9]*: ended, but", "thread Thread-"]


@pytest.mark.long
def test_what_a_test_leaves_behind_fails_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pytester.makepyfile(TESTS)
    done = pytester.runpytest_subprocess("-p", "tests.leftovers", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=5, errors=4)
    done.stdout.re_match_lines([f".*the test leaves behind: {what}.*" for what in TOLD])
