"""What ``persona-agent`` does besides running: it asks the agent that runs, or looks at the settings."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persona import answers
from persona.decisions import PersonaRef
from persona.documents import Persona
from persona.problems import Fault, PersonaError, Reason
from persona_guest.agent.answers import refused
from persona_guest.agent.sshd_config import advice
from persona_guest.enforce import plan as plans
from persona_guest.enforce.cgroups.facility import Cgroups
from persona_guest.enforce.network.build import Net
from persona_guest.kernel.cgroup import Hierarchy
from persona_guest.settings import Mode, Settings
from persona_guest.shell.client import AgentError, Client
from persona_guest.system import runtime_dir

log = logging.getLogger("persona.agent")


def check_config(path: str, settings: Settings, *, as_json: bool = False) -> int:
    """Says what was understood of ``path``, and what in sshd's settings goes past the gate."""
    notes = [*_missing(settings), *advice()]
    if as_json:
        said = {"config": path, "mode": str(settings.mode), "vm": settings.vm.name, "notes": notes}
        print(answers.as_json(said))
        return 0
    print(f"{path}: mode {settings.mode}, VM {settings.vm.name}")
    for line in notes:
        print(f"note: {line}")
    return 0


def _missing(settings: Settings) -> Iterator[str]:
    if not settings.broker.url or not settings.broker.events_url:
        what = "every command is denied" if settings.mode is Mode.ENFORCE else "nothing can be decided"
        yield f"broker.url and broker.events_url: without both {what}"
    try:
        if os.stat(settings.broker.token_file).st_mode & 0o077:
            yield f"{settings.broker.token_file}: others can read it; chmod 600"
    except OSError as error:
        yield f"{settings.broker.token_file}: {error.strerror}; 'persona-broker guest add' makes one"


def release(settings: Settings, *, as_json: bool = False) -> int:
    """Every gated session goes on ungated and unbound; 1 where no agent could be told."""
    try:
        with Client(f"{settings.paths.runtime_dir}/agent.sock") as client:
            answer = client.call("release")
    except AgentError as error:
        refused(error.code, error.message, as_json=as_json)
        if error.code == Fault.UNAUTHENTICATED:
            return 1
        if settings.paths.cgroup_root:  # what it bound must not outlive it
            _unbind(Path(settings.paths.runtime_dir), settings.paths.cgroup_root)
        return 1
    if as_json:
        print(answers.as_json(answer))
    return 0


def _unbind(runtime: Path, cgroup_root: str) -> None:
    """What a dead agent left goes, as far as it can: one thing that stays keeps no other."""
    try:
        state = runtime_dir.prepare(runtime)
        runtime_dir.take_over(runtime, state)
        Net(state, cgroup_root, _no_documents, lambda _session: False).clear()
    except Exception as error:  # no nftables, no pyroute2: the cgroups go all the same
        log.error("network: something stays: %s", error)
    try:
        for failure in plans.apply_each(Cgroups(Hierarchy(cgroup_root)).release()):
            log.error("cgroups: something stays: %s", failure)
    except (PersonaError, OSError) as error:
        log.error("cgroups: something stays: %s", error)


def _no_documents(ref: PersonaRef) -> Persona:
    raise PersonaError(Reason.PERSONA_UNAVAILABLE, f"persona {ref.name} is not here")


def plan(settings: Settings, *, as_json: bool) -> int:
    """Prints where sessions live, and what would be changed now so that what is found is what should be."""
    try:
        with Client(f"{settings.paths.runtime_dir}/agent.sock") as client:
            answer: dict[str, Any] = client.call("plan")
    except AgentError as error:
        return refused(error.code, error.message, as_json=as_json)
    if as_json:
        print(answers.as_json({"places": answer["places"], "plan": answer["plan"]}))
        return 0
    for place in answer["places"]:
        print(f"{place['persona']['name']} v{place['persona']['version']}: {place['cgroup']}")
    for step in answer["plan"]:
        print(json.dumps(step))
    if not answer["plan"]:
        print("nothing to change")
    return 0
