"""A test that goes over nothing fails: by ``some``, and where its parameters are a glob's."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.some import some

ROOT = Path(__file__).parents[1]


def test_what_is_there_comes_in_its_order_and_nothing_fails(tmp_path: Path) -> None:
    assert some(iter("ba")) == ["b", "a"]
    with pytest.raises(AssertionError, match="nothing here to be checked"):
        some(tmp_path.glob("*"))


def test_parameters_of_which_there_are_none_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\n@pytest.mark.parametrize('file', [])\ndef test_x(file): pass\ndef test_y(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "setup.cfg")]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "Empty parameter set in 'test_x'" in done.stdout
