"""The report at the end of a run: what each part took, what was over its budget, what was tried twice, what failed."""

from pathlib import Path

import pytest

from tests import report
from tests.retried import RETRIED

XML = '<testsuite><testcase classname="tests.guest.test_x" name="test_{0}" time="{1}"/></testsuite>'


def parts(directory: Path, retried: int = 0) -> None:
    (directory / "parts.tsv").write_text("style\t60\t30\t0\nfast\t90\t95\t0\nguests\t900\t100\t1\n")
    (directory / "fast.xml").write_text(XML.format("quick", "0.5"))
    (directory / "guests.xml").write_text(XML.format("slow", "70.25"))
    (directory / "guests.retried.txt").write_text("test_x\ta reason\n" * retried)


def test_what_is_told(tmp_path: Path) -> None:
    parts(tmp_path, retried=1)
    told = report.lines(report.read(tmp_path), 1300)
    assert [line.split() for line in told[1:5]] == [
        ["style", "-", "30", "60"],
        ["fast", "1", "95", "90", "over", "its", "budget"],
        ["guests", "1", "100", "900", "FAILED"],
        ["the", "whole", "run", "2", "1300", "1200", "over", "its", "budget"],
    ]
    assert "    70.2 s  guest/test_x.py::test_slow" in told
    assert "  test_x: a reason" in told


def test_why_a_test_failed_is_told_at_the_end_of_a_run(tmp_path: Path) -> None:
    parts(tmp_path)
    broken = '<failure message="AssertionError: assert 1 == 2&#10; + where 1 = x()">a traceback</failure>'
    (tmp_path / "guests.xml").write_text(XML.format("slow", "70.25").replace("/></", f">{broken}</testcase></"))
    assert report.lines(report.read(tmp_path), 1300)[-3:] == [
        "failed: guest/test_x.py::test_slow",
        "    AssertionError: assert 1 == 2",
        "     + where 1 = x()",
    ]


@pytest.mark.parametrize(("retried", "code"), [(0, 0), (3, 0), (4, 1)])
def test_more_than_three_second_tries_fail_the_run(tmp_path: Path, retried: int, code: int) -> None:
    parts(tmp_path, retried)
    assert report.main([str(tmp_path), "100"]) == code
    assert (tmp_path / "report.txt").exists()


def test_what_may_be_tried_twice_exists_and_has_a_reason() -> None:
    root = Path(__file__).parents[1]
    for test, reason in RETRIED.items():
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (root / file).read_text()
        assert len(reason.split()) >= 4
