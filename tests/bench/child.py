"""Children of the benchmark: whatever goes wrong in one, it ends there.

A child made by fork(2) has its parent's stack: an error in it would unwind what the *parent* has open, and
end the agent or the broker that the others measure.
"""

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator


def fork(work: Callable[[], object]) -> int:
    """A child that does the work and ends, with 0 if it came to its end; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A child for the time of the block; its pid."""
    pid = fork(work)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def in_child(work: Callable[[], float]) -> float:
    """What the work returns, done in a child.  Raises ``RuntimeError`` where it fails, having told why."""
    reading, writing = os.pipe()
    pid = fork(lambda: os.write(writing, repr(work()).encode()))
    os.close(writing)
    with os.fdopen(reading) as result:
        text = result.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or not text:
        raise RuntimeError("the measuring child failed")
    return float(text)
