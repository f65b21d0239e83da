"""``persona-host``: watches the hosts (``run``), shows what it saw (``top``) and what their VMs would have (``plan``).

Exit codes: 0 done, 1 refused, or a host that is not seen, 2 usage, 3 a file cannot be used.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from persona.answers import as_json, refusal
from persona.problems import Fault, PersonaError
from persona.version import VERSION
from persona_broker import settings as configuration
from persona_broker.host import top
from persona_broker.host.sample_files import SIZE_MAX, SampleFiles
from persona_broker.settings import Settings
from persona_broker.store.interface import StoreError

CONFIG = "/etc/persona/broker.toml"

log = logging.getLogger("persona.host")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        settings = configuration.load(Path(arguments.config))
        configuration.check(settings)
        return int(arguments.run(arguments, settings))
    except PersonaError as error:
        return _refused(arguments, 1, str(error.code), error.message)
    except StoreError as error:
        return _refused(arguments, 3, str(Fault.NOT_READY), f"the database cannot be used: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing more
        return 0
    except OSError as error:
        return _refused(arguments, 3, str(Fault.NOT_READY), str(error))
    except KeyboardInterrupt:
        return 130


def _refused(arguments: argparse.Namespace, code: int, why: str, message: str) -> int:
    if arguments.json:
        print(refusal(why, message))
    else:
        print(f"persona-host: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="persona-host", description="watches the hosts on which the VMs run")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    parser.add_argument("--config", default=CONFIG, help=f"settings of the broker, TOML (default {CONFIG})")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "watch the hosts until a signal comes"
    run = commands.add_parser("run", help=text, description=text)
    run.set_defaults(run=_run, json=False)
    text = "load of the hosts, and what their domains do"
    shown = commands.add_parser("top", help=text, description=text)
    shown.add_argument("--json", action="store_true", help="the answer as one line of JSON")
    shown.set_defaults(run=_top)
    text = "what each VM would have of its host, by the personas of its sessions; nothing is changed"
    planned = commands.add_parser("plan", help=text, description=text)
    planned.add_argument("host", nargs="?", metavar="HOST", help="only this one")
    planned.add_argument("--json", action="store_true", help="the answer as one line of JSON")
    planned.set_defaults(run=_plan)
    return parser


def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Each host in a thread of its own: one that does not answer holds up no other."""
    from persona_broker.host.machine import Machine
    from persona_broker.host.poller import DomainPoller, HostPoller

    try:
        from persona_broker.host.libvirt_hypervisor import LibvirtHypervisor
    except ImportError as error:
        fix = "install Debian's python3-libvirt"
        raise PersonaError(Fault.NOT_READY, f"libvirt-python is not there ({error}); {fix}") from error
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    directory = Path(settings.host.directory)
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    threads = []
    for host, uri in configuration.hosts_of(settings.host).items():
        read_host = Machine().read if configuration.is_local(uri) else None
        domains = DomainPoller(uri, LibvirtHypervisor, with_host=read_host is None)
        poller = HostPoller(host, uri, domains, read_host, SampleFiles(directory).put)
        threads.append(threading.Thread(target=_watched, args=(poller.run, stop), name=f"host {host}", daemon=True))
        threads[-1].start()
        log.info("watching %s at %s", host, uri)
    stop.wait()
    until = time.monotonic() + 3
    for thread in threads:  # one that hangs in libvirt ends with the process
        thread.join(max(0.0, until - time.monotonic()))
    return 0


def _watched(run: Callable[[threading.Event], None], stop: threading.Event) -> None:
    """A host's thread that dies of a bug takes the process with it, and systemd starts it again."""
    try:
        run(stop)
    except BaseException:
        log.critical("a host's thread ended; so does its process", exc_info=True)
        os._exit(70)


def _top(arguments: argparse.Namespace, settings: Settings) -> int:
    """0 each host of the settings is seen, 1 one is not."""
    directory, now = Path(settings.host.directory), time.time()
    names = configuration.hosts_of(settings.host)
    files = SampleFiles(directory, names)
    samples = {sample.host: sample for sample in files.news(len(names) * SIZE_MAX)}
    max_age_s = float(settings.load_max_age_s)
    hosts = [top.HostRow(name, samples.get(name), now, max_age_s) for name in names]
    if arguments.json:
        print(as_json([host.as_json() for host in hosts]))
    else:
        print("\n".join(line for host in hosts for line in host.lines()))
    return 0 if all(host.is_seen for host in hosts) else 1


def _plan(arguments: argparse.Namespace, settings: Settings) -> int:
    """0 each host is seen, 1 one is not."""
    from contextlib import closing

    from persona_broker.cli.store import for_reading
    from persona_broker.shaping import plan
    from persona_broker.shaping.inputs import live_sessions
    from persona_broker.view import State

    names = [*configuration.hosts_of(settings.host)]
    if arguments.host is not None:
        if arguments.host not in names:
            raise PersonaError(
                Fault.NOT_FOUND, f"{arguments.host!r} is not in host.names; those are {', '.join(names)}"
            )
        names = [arguments.host]
    with closing(for_reading(settings)) as store:
        view = State(store, settings.load_max_age_s, settings.health_max_age_s).current()
        sessions, now = live_sessions(view, store.sessions()), time.time()
        plans = [plan.of(name, view, sessions, now) for name in names]
    if arguments.json:
        print(as_json([one.as_json() for one in plans]))
    else:
        print("\n".join(line for one in plans for line in one.lines()))
    return 0 if all(one.is_seen for one in plans) else 1


if __name__ == "__main__":
    sys.exit(main())
