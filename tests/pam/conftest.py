"""The module as it is built here, and a PAM stack with it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pam.stack import MODULE, Stack


@pytest.fixture(scope="session", autouse=True)
def _module() -> None:
    subprocess.run(["make", "-s", "-C", str(MODULE.parent)], check=True)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    if stack.agent:
        stack.agent.close()
