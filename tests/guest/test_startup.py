"""persona-shell, persona and the standby start quickly: what they import is counted."""

import subprocess
import sys

import pytest

from tests.guest.conftest import ROOT

COUNT = (
    "import sys; before = set(sys.modules); sys.path[:0] = {path!r}; import {module}; print(*set(sys.modules) - before)"
)


@pytest.mark.parametrize(
    ("module", "most"),
    [("persona_guest.shell.login", 60), ("persona_guest.shell.cli", 75), ("persona_guest.standby.service", 120)],
)
def test_what_is_imported(module: str, most: int) -> None:
    code = COUNT.format(path=[str(ROOT), str(ROOT / "guest")], module=module)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=30)
    found = set(done.stdout.split())
    assert len(found) <= most
    assert found & {"http.client", "ssl", "urllib.request", "asyncio", "subprocess"} == set()
