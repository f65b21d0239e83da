"""The benchmark tells no figure that it did not measure, and a failing child takes nothing of its parent's along."""

from pathlib import Path

import pytest

from tests.bench import store
from tests.bench.child import in_child
from tests.bench.row import Missing, Row, measured


class Left:
    """A context that notes each time that it is left, in whatever process."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        with self._notes.open("a") as notes:
            notes.write("left\n")


def fails() -> float:
    raise LookupError("no agent")


def test_a_child_that_fails_unwinds_nothing_of_its_parent(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with Left(notes):
        with pytest.raises(RuntimeError):
            in_child(fails)
        assert not notes.exists()
        assert in_child(lambda: 1.5) == 1.5
        assert not notes.exists()
    assert notes.read_text() == "left\n"


def test_the_store_s_figures_are_of_what_was_applied() -> None:
    whole, one = store.of(40, "40")
    assert (whole.name, one.name) == ("store.apply_ms.40", "store.change_ms.40")
    assert min(whole.value, whole.peer_value, one.value) > 0


def test_a_figure_that_failed_is_missing_and_the_others_go_on() -> None:
    row = Row("a", 1.0, "s", "b", 2.0, 0.5, "")

    def rows() -> list[Row]:
        raise RuntimeError("9 sessions are open and not 10")

    found = list(measured(("a", lambda: row), ("agent.*", rows), ("c", lambda: [row, row])))
    assert found == [row, Missing("agent.*", "RuntimeError: 9 sessions are open and not 10"), row, row]
