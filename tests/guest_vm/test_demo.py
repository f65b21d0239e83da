"""The demo's story comes out as it is told, and would say so if it did not."""

import pytest

from tests.guest_vm.demo import Story, tell
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker


def test_the_story(guest: Machine, broker: Broker) -> None:
    story = tell(guest, broker)
    assert story.wrong == []
    assert story.scenes > 15


def test_a_scene_that_comes_out_otherwise_is_said(guest: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    story = Story(guest)
    story.play("alice", "ls -d /etc", "/home")
    assert story.wrong == ["ls -d /etc"]
    assert "not as it should be" in capsys.readouterr().out
