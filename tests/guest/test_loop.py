"""The agent's loop: timers go by the clock that it is given, and it serves until something has come about."""

import os
import threading

import pytest
from persona_guest.loop import READABLE, Loop


def test_timers_go_by_the_loop_s_clock() -> None:
    now, called = [0.0], list[str]()
    loop = Loop(lambda: now[0])
    loop.call_later(3600, lambda: called.append("an hour"))
    loop.call_later(60, lambda: called.append("a minute"))

    def later() -> bool:
        now[0] += 50  # as each round would take so long
        return len(called) == 2

    loop.run_until(later, 5000)
    assert called == ["a minute", "an hour"]
    assert 3600 <= now[0] < 3750


def test_a_round_that_fails_for_want_of_something_is_not_the_last() -> None:
    now, calls = [0.0], list[float]()
    loop = Loop(lambda: now[0])

    def look() -> None:
        calls.append(now[0])
        raise OSError(24, "Too many open files")

    def later() -> bool:
        now[0] += 1
        return len(calls) == 3

    loop.call_every(10, look)
    loop.run_until(later, 100)
    assert len(calls) == 3


def test_what_does_not_come_about_is_an_error_in_the_loop_s_time() -> None:
    now = [0.0]
    loop = Loop(lambda: now[0])

    def never() -> bool:
        now[0] += 1
        return False

    with pytest.raises(TimeoutError):
        loop.run_until(never, 100)
    assert 100 <= now[0] < 103


def test_what_another_thread_delivers_is_waited_for() -> None:
    loop, found = Loop(), list[int]()
    thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(lambda: found.append(1)))
    thread.start()
    loop.run_until(lambda: found, 5)
    thread.join()


def test_it_may_run_again_after_a_stop() -> None:
    loop = Loop()
    for _ in range(2):
        loop.call_later(0, loop.stop)
        loop.run()


def test_closing_gives_its_descriptors_back() -> None:
    before = os.listdir("/proc/self/fd")
    loop = Loop()
    reading, writing = os.pipe()
    loop.add_reader(reading, READABLE, lambda _events: None)
    loop.close()
    os.close(reading)
    os.close(writing)
    assert os.listdir("/proc/self/fd") == before


def test_what_was_ready_under_a_number_is_nothing_of_the_next_one_s_under_it() -> None:
    """Of two descriptors that are ready in one round the first one's handler closes the other, and opens a third."""
    loop, called = Loop(), list[int]()
    (first, first_in), (second, second_in) = os.pipe(), os.pipe()
    third: list[int] = []

    def replaces(_events: int) -> None:
        os.read(first, 1)
        loop.remove_reader(second)
        os.close(second)
        third.extend(os.pipe())
        assert second in third  # the lowest number that is free
        loop.add_reader(third[0], READABLE, called.append)
        loop.call_later(0.1, loop.stop)

    loop.add_reader(first, READABLE, replaces)
    loop.add_reader(second, READABLE, lambda _events: None)
    os.write(first_in, b"x")
    os.write(second_in, b"x")
    loop.run()
    for fd in (first, first_in, second_in, *third):
        os.close(fd)
    assert called == []
