"""``persona-agent load-kernel`` and ``unload-kernel``: root's and the package's business, before there is an agent."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from persona import answers
from persona.problems import Reason
from persona_guest.agent.answers import refused
from persona_guest.lsm.loader import KernelLayerError, Machine, load, unload
from persona_guest.settings import Settings
from persona_guest.system.start_progress import LOADER, ProgressWriter


@contextlib.contextmanager
def _progress_shown(settings: Settings) -> Iterator[None]:
    """The verifier takes seconds, on a slow machine many, and an agent that is to start waits for it."""
    told = ProgressWriter(Path(settings.paths.runtime_dir) / "state", LOADER)
    try:
        yield
    finally:
        told.ready()


def run(command: str, settings: Settings, *, as_json: bool = False) -> int:
    """``load-kernel`` and ``unload-kernel``; the exit code: 0 done, 1 refused though the kernel should be able to.

    A kernel that has no BPF LSM is no failure: the agent then checks after each start, and says so.
    """
    machine = Machine()
    kept = Path(settings.paths.state_dir) / "verifier.log"
    lacking = None
    try:
        if command == "unload-kernel":
            unload(settings.paths.bpf_dir)
        elif (lacking := machine.lacks(settings.paths.bpf_dir)) is None:
            with _progress_shown(settings):
                load(settings, machine)
            kept.unlink(missing_ok=True)
    except KernelLayerError as error:
        code = refused(error.code, error.message, as_json=as_json)
        if error.log:
            kept.write_text(error.log)
            print(f"persona-agent: what the verifier says is in {kept}", file=sys.stderr)
        return code
    except OSError as error:
        return refused(Reason.KERNEL_LAYER_MISSING, f"{command}: {error}", as_json=as_json)
    if as_json:
        print(answers.as_json({"loaded": command == "load-kernel" and lacking is None, "why_not": lacking}))
    elif lacking is not None:
        print(f"persona-agent: no kernel layer: {lacking}", file=sys.stderr)
    return 0
