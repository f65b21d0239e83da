"""docs/reference is what the code says: written by hand it is compared with the code, else it is made from it."""

import ast
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from persona_broker import metrics, problems
from persona_broker import settings as broker_settings
from persona_broker.serve import app
from persona_guest import settings as guest_settings
from persona_guest.ipc import users as user_socket
from persona_guest.kernel import memory

from persona import codec
from persona.conditions import METRICS
from persona.decisions import Denied, Granted, Lease, PersonaRef, Width
from persona.health import Report, VmHealth
from persona.problems import Fault, PersonaError, Reason
from scripts import reference
from tests.some import some

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of all tables of so many columns, without their heads; ``\\|`` in a cell is a bar."""
    found = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return [cells for cells in found if len(cells) == columns]


# --- problems.md --------------------------------------------------------------------------------------


def codes_of_their_own() -> set[str]:
    """Codes that the code says as plain text: the first word of an AgentError, and of each answer's ``code``."""
    found = set()
    for part in ("persona", "broker/persona_broker", "guest/persona_guest"):
        for file in (ROOT / part).rglob("*.py"):
            tree = ast.parse(file.read_text())
            named = {
                target.id: node.value.value
                for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            for value in said_as_codes(tree):
                text = named.get(value.id) if isinstance(value, ast.Name) else getattr(value, "value", None)
                if isinstance(text, str):
                    found.add(text)
    return found


def said_as_codes(tree: ast.AST) -> Iterator[ast.expr]:
    answers = {"AgentError", "PersonaError", "BrokerError", "Denied", "refused", "refusal", "_refusal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in answers and node.args:
            yield node.args[0]
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "code":
                    yield value


def test_every_code_is_explained_once_and_no_other() -> None:
    text = (PAGES / "problems.md").read_text()
    explained = [cells[0].strip("`") for cells in (*rows(text, 3), *rows(text, 4))]
    own = codes_of_their_own()
    assert own == {"agent_unreachable", "gate_failed"}  # what follows finds nothing where this finds nothing
    assert sorted(explained) == sorted({*Reason, *Fault, *own})


def test_every_code_says_what_to_do() -> None:
    text = (PAGES / "problems.md").read_text()
    for code, *_, meaning, remedy in (*some(rows(text, 3)), *some(rows(text, 4))):
        assert meaning.endswith(".") and remedy.endswith("."), code
        assert len(remedy.split()) >= 4, (code, remedy)
    for code, *_, remedy in some(row for row in rows(text, 3) if row[0].strip("`") in list(Reason)):
        assert "User: " in remedy or "Operator: " in remedy, code


def test_every_fault_names_its_http_status() -> None:
    said = {cells[0].strip("`"): int(cells[1]) for cells in rows((PAGES / "problems.md").read_text(), 4)}
    assert said == {str(fault): int(problems._STATUS.get(fault, 500)) for fault in Fault}


# --- settings.md --------------------------------------------------------------------------------------

TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", tuple[str, ...]: "list"}
OF_THE_MACHINE = {  # what the default is on one machine says nothing
    "vm.name": "the host name up to its first dot",
    "gate.uid_min": "`UID_MIN` of /etc/login.defs, else 1000",
}
SETTINGS: dict[str, type[Any]] = {"guest.toml": guest_settings.Settings, "broker.toml": broker_settings.Settings}


def keys_of(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Each key with its type and its default, as TOML."""
    hints = get_type_hints(kind)
    defaults = kind()
    for item in fields(kind):
        hint, default = hints[item.name], getattr(defaults, item.name)
        if is_dataclass(default):
            yield from keys_of(type(default), f"{prefix}{item.name}.")
            continue
        shown = f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"
        known = TYPES[str if isinstance(default, str) else hint]
        yield prefix + item.name, known, OF_THE_MACHINE.get(prefix + item.name, shown)


def described(file: str) -> list[tuple[str, str, str, str]]:
    """Key, type, default, what is allowed."""
    text = (PAGES / "settings.md").read_text()
    part = re.split(r"^## ", text.partition(f"## {file}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return [(key.strip("`"), kind, default, allowed) for key, kind, default, allowed, _ in rows(part, 5)]


ALL_KEYS = [(file, *row) for file in SETTINGS for row in described(file)]


def taken(file: str, key: str, value: object, tmp_path: Path) -> bool:
    """Whether this value is accepted of this key, by what reads the file."""
    try:
        if file == "guest.toml":
            table, _, name = key.rpartition(".")
            guest_settings.parse({table: {name: value}} if table else {name: value}, file)
        else:
            path = tmp_path / file
            path.write_text(f"{key} = {json.dumps(value)}\n")
            found = broker_settings.load(path)
            if key == "insecure_loopback":
                found = replace(found, bind="127.0.0.1:1", events_bind="[::1]:1")
            broker_settings.check(found)
    except PersonaError:
        return False
    return True


@pytest.mark.parametrize("file", SETTINGS)
def test_every_key_is_described_with_type_and_default(file: str) -> None:
    said = [(key, kind, default) for key, kind, default, _ in described(file)]
    assert said == list(keys_of(SETTINGS[file]))


@pytest.mark.parametrize(("file", "key", "kind", "default", "allowed"), ALL_KEYS)
def test_what_is_allowed_is_what_is_accepted(
    file: str, key: str, kind: str, default: str, allowed: str, tmp_path: Path
) -> None:
    if allowed == "the same":
        allowed = "`HOST:PORT`, `[IPv6]:PORT`, `unix:/PATH` (at most 107 bytes)"
    if bounds := re.fullmatch(r"([0-9.]+) to ([0-9]+)", allowed):
        lowest, highest = (json.loads(number) for number in bounds.groups())
        step = 1 if kind == "whole number" else 0.01
        for value, right in ((lowest, True), (highest, True), (lowest - step, False), (highest + step, False)):
            assert taken(file, key, value, tmp_path) is right, value
        return
    assert kind not in ("number", "whole number"), "a number has bounds"
    odd: Mapping[str, list[object]] = {
        "text": ["any\tthing at all: /\u00e9"],
        "list": [["any thing", "relative/path"], [f"/{number}" for number in range(65)]],
        "true or false": [True, False],
    }
    if allowed == "any":
        assert all(taken(file, key, value, tmp_path) for value in odd[kind])
        return
    assert not all(taken(file, key, value, tmp_path) for value in odd[kind]), "this is allowed as well"
    if allowed.startswith("nothing, "):
        assert taken(file, key, "", tmp_path)
    examples = [*re.findall(r"`([A-Za-z:/\[][^`]+)`", allowed)]
    for example in examples:
        for word, instead in (("[IPv6]", "[::1]"), ("HOST", "a.example"), ("PORT", "1"), ("PATH", "run/x")):
            example = example.replace(word, instead)
        assert taken(file, key, example, tmp_path), example
    if longest := re.search(r"at most ([0-9]+)(| bytes)$|at most ([0-9]+) bytes\)", allowed):
        size = int(longest[1] or longest[3])
        start = "unix:/" if longest[3] else ""
        whole = start + "x" * (size + len("unix:") - len(start) if start else size)
        assert taken(file, key, whole, tmp_path)
        assert not taken(file, key, whole + "x", tmp_path)
    if "absolute director" in allowed and kind == "list":
        assert taken(file, key, ["/a", "/b"], tmp_path)
        assert not taken(file, key, ["a"], tmp_path)
    elif "absolute" in allowed:
        assert taken(file, key, "/a", tmp_path)
        assert not taken(file, key, "a", tmp_path)
    if most := re.match(r"at most ([0-9]+) absolute", allowed):
        assert taken(file, key, ["/x"] * int(most[1]), tmp_path)
        assert not taken(file, key, ["/x"] * (int(most[1]) + 1), tmp_path)


def test_the_example_of_the_broker_has_every_key(tmp_path: Path) -> None:
    example = (ROOT / "docs" / "broker.md").read_text().partition("```toml\n")[2].partition("```")[0]
    path = tmp_path / "broker.toml"
    path.write_text(example)
    broker_settings.check(broker_settings.load(path))
    named = re.findall(r"^([\w.]+) =", example, re.MULTILINE)
    assert named == [key for key, *_ in keys_of(broker_settings.Settings)]


# --- the pages that are made --------------------------------------------------------------------------


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_page_is_what_the_code_says(page: str) -> None:
    assert (PAGES / page).read_text() == reference.PAGES[page](), "run scripts/reference.py"


@pytest.mark.parametrize("page", reference.PAGES)
def test_no_cell_that_should_say_something_is_empty(page: str) -> None:
    for line in some(line for line in (PAGES / page).read_text().splitlines() if line.startswith("| ")):
        assert not line.endswith("|  |"), line


def test_the_protocol_has_every_route() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    table = text.partition("## Broker, HTTP")[2].partition("\nErrors are")[0]
    named = set()
    for line in table.splitlines():
        if line.startswith("| `"):
            method = ""
            for first, path in re.findall(r"`(?:([A-Z]+) )?(/[^` ]+)`", line.split("|")[1]):
                method = first or method
                named.add((method, path))
    assert named == set(reference.routes())


def test_who_needs_no_token_is_who_the_protocol_says() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    said = re.findall(r"`(?:GET )?(/[^`]+)`", text.partition("Every call but ")[2].partition("bears")[0])
    assert sorted(said) == sorted(path for (_, path), (_, who, _) in reference.routes().items() if who == "anybody")


def test_the_protocol_has_every_operation() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    users = text.partition("## `persona` and `persona-shell`, JSON")[2].partition("\n## ")[0]
    named = {cells[0]: cells[2].startswith("root only") or cells[1].startswith("root only") for cells in rows(users, 3)}
    assert named == {name: who == "root" for name, who, *_ in reference.operations()}
    pam = text.partition("## PAM module")[2].partition("\n## ")[0]
    numbered = re.findall(r"^\| ([0-9]) \| ([A-Z]+) \|", pam, re.MULTILINE)
    assert numbered == [(str(item.value), item.name) for item in (*reference.PAM_OPS, *reference.VERDICTS)]


def test_every_word_of_agent_and_standby_is_there() -> None:
    guest = ROOT / "guest" / "persona_guest"
    code = (guest / "standby" / "service.py").read_text() + (guest / "ipc" / "standby.py").read_text()
    assert set(reference.STANDBY) == set(re.findall(r"\bencode\(\"(\w+)\"", code))
    table = (ROOT / "docs" / "protocol.md").read_text().partition("## Agent and standby")[2].partition("\n## ")[0]
    assert {word for word, (who, _) in reference.STANDBY.items() if who == "agent"} == {
        cells[0].strip("`").split()[0] for cells in rows(table.replace("` with descriptors", "`"), 3)
    }


def test_every_socket_is_there() -> None:
    sources = [*(ROOT / "guest" / "persona_guest").rglob("*.py"), *(ROOT / "systemd").glob("*.socket")]
    named = {name for file in sources for name in re.findall(r"[\"/]([a-z]+\.sock)\b", file.read_text())}
    assert named - {"api.sock", "events.sock"} == set(  # those two are of a trial, between its own two halves
        re.findall(r"^## ([a-z]+\.sock)$", (PAGES / "sockets.md").read_text(), re.MULTILINE)
    )


def test_metrics_have_the_labels_that_the_page_names(tmp_path: Path) -> None:
    from persona_broker.host.core.sample import HostSample
    from persona_broker.policy.conditions import ConditionState, Sample, Unmet
    from persona_broker.policy.host_load import HostState
    from persona_broker.policy.rollout import Denials
    from persona_broker.policy.vm_health import Reported
    from persona_broker.spread import Spread
    from persona_broker.store.hosts import SeenHost

    flask = app.base(broker_settings.Settings(db=str(tmp_path / "db")), ())
    lease = Lease(30.0, Width.ARGV)
    metrics.decided(Granted(PersonaRef("P", 1), "p", lease, 1), 0.001)
    metrics.decided(Denied(Reason.NO_MATCHING_POLICY, None, None, "", lease, 1), 0.001)
    metrics.admitted(True)
    metrics.sink("syslog", False, 1)
    metrics.checkpoint_made(1.0)
    report = Report({}, None, {}, None, None, None, None, {"seccomp": True})
    sample = HostSample("lab", "qemu:///system", 1.0, dict.fromkeys(METRICS, 5.0), 1.0, ())
    seen = SeenHost(sample, HostState("lab", Sample(1.0, {}, "lab"), frozenset(), 1.0, {}))
    view = replace(
        flask.extensions["state"].current(),
        sample=Sample(1.0, dict.fromkeys(METRICS, 5.0), "set"),
        hosts={"lab": seen},
        health={"vm-1": Reported(1.0, report, frozenset())},
        condition_state=ConditionState(1, {}, {"vm-1": {VmHealth(()): Unmet(Reason.VM_UNHEALTHY, "")}}),
    )
    surging = Spread({}, {}, Denials(1.0, {}), Denials(1.0, {"outside_hours": 99}))
    found: dict[str, tuple[str, ...]] = {}
    for line in metrics.render(view, 0, surging).splitlines():
        if not line.startswith("#"):
            name, labels = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line).groups()  # type: ignore[union-attr]
            family = re.sub("_(bucket|sum|count)$", "", name.removeprefix("persona_broker_"))
            found[family] = max(found.get(family, ()), tuple(re.findall(r'(\w+)="', labels or "")))
    assert found == {name: reference.LABELS.get(name, ()) for name in metrics.METRICS}


def test_every_link_leads_somewhere() -> None:
    link = re.compile(r"\]\(([^)#]*)(?:#[^)]*)?\)")
    links = [(page, target) for page in PAGES.glob("*.md") for target in link.findall(page.read_text())]
    for page, target in some(links):
        assert not target or (PAGES / target).exists(), (page.name, target)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_to_a_part_of_a_page_leads_there() -> None:
    link = re.compile(r"\]\(([^)#]*)#([^)]*)\)")
    links = [(page, *found) for page in PAGES.glob("*.md") for found in link.findall(page.read_text())]
    for page, target, part in some(links):
        assert part in anchors(PAGES / target if target else page), (page.name, target, part)


def test_the_index_names_every_page() -> None:
    named = re.findall(r"^\| \[(\w+\.md)\]\(\1\)", (PAGES / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in PAGES.glob("*.md") if page.name != "README.md")


def test_the_figures_of_the_problems_are_those_of_the_code() -> None:
    text = (PAGES / "problems.md").read_text()
    assert f"({codec.MAX_BODY // 1024} KiB to the broker, {user_socket._REQUEST_MAX // 1024} KiB to the agent)" in text
    assert f"(over {memory.ARGV_BYTES_MAX // 1024} KiB or {memory.ARGS_MAX:,} arguments)" in text


def test_the_settings_that_are_shipped_show_the_defaults() -> None:
    """Of the lines that are comments, too; but for those that have no default that would be of use."""
    lines = (ROOT / "packaging" / "etc" / "guest.toml").read_text().splitlines()
    shown = tomllib.loads("\n".join(re.sub(r"^# (?=\w+ = )", "", line) for line in lines))
    assert {"name"} == set(shown.pop("vm"))
    for example in ("url", "events_url"):
        assert shown["broker"].pop(example).startswith("https://broker.example:")
    defaults = guest_settings.Settings()
    assert shown.keys() == {"mode", "broker", "gate", "dependencies", "audit"}
    assert shown.pop("mode") == defaults.mode
    for table, values in shown.items():
        assert values
        for key, value in values.items():
            default = getattr(getattr(defaults, table), key)
            assert value == (list(default) if isinstance(default, tuple) else default), f"{table}.{key}"
