"""What people write in place of what a document takes: each is refused, with what they meant."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona.dependencies import parse_dependency
from persona.documents import parse_document
from persona.guesses import (
    bytes_meant,
    cpu_meant,
    dependency_meant,
    hours_meant,
    of_persona,
    of_policy,
    rule_meant,
)
from persona.parsing import Bad, DocumentError
from persona.patterns import parse_pattern

PERSONA: dict[str, Any] = {"kind": "Persona", "name": "A", "command_whitelist": ["ls"]}
POLICY: dict[str, Any] = {"kind": "Policy", "name": "a", "subjects": {"users": ["alice"]}, "persona": "A"}

WORDS = st.sampled_from(
    ["1", "443", "tcp", "udp", "any", "*", ":", "/", "-", ".", "10.0.0.1", "::", "[", "]", "in:", " via ", "%", "pm",
     "Mon", " ", ",", ">=", "(", ")", "a", "service:", "G", "iB", "\u0663", "\u00b2", "\x00", "\ud800", "9" * 30, "UTC"]
)  # fmt: skip
ANYTHING = (
    st.lists(WORDS, max_size=12).map("".join) | st.text(max_size=30) | st.integers() | st.floats() | st.none()
    | st.booleans() | st.just(10**5000) | st.just("9" * 5000) | st.lists(WORDS, max_size=2)
    | st.dictionaries(WORDS | st.sampled_from(["host", "port", "proto"]), WORDS | st.integers() | st.none(), max_size=3)
)  # fmt: skip
IN_PERSONA = [
    ({"network_access": ["443"]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": [443]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": ["tcp/443"]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": ["80/tcp"]}, "network_access[0]", "any:tcp/80"),
    ({"network_access": ["53/udp"]}, "network_access[0]", "any:udp/53"),
    ({"network_access": ["*:443"]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": ["any:443"]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": ["tcp:443"]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": ["any:tcp/https"]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": ["https"]}, "network_access[0]", "any:tcp/443"),
    ({"network_access": ["in:8080"]}, "network_access[0]", "in:any:tcp/8080"),
    ({"network_access": ["10.0.0.5:5432"]}, "network_access[0]", "write 10.0.0.5:tcp/5432"),
    ({"network_access": ["[2001:db8::1]:443"]}, "network_access[0]", "write 2001:db8::1:tcp/443"),
    ({"network_access": ["10.20.*"]}, "network_access[0]", "write 10.20.0.0/16"),
    ({"network_access": ["github.com"]}, "network_access[0]", "names are not looked up"),
    ({"network_access": ["db.internal:5432"]}, "network_access[0]", "any:tcp/5432 for that port"),
    ({"network_access": ["https://pypi.org/simple"]}, "network_access[0]", "names are not looked up"),
    ({"network_access": ["*"]}, "network_access[0]", "write any"),
    ({"network_access": ["ping"]}, "network_access[0]", "write icmp"),
    ({"network_access": ["!10.0.0.0/8"]}, "network_access[0]", "rules only allow"),
    ({"network_access": [{"host": "10.0.0.1", "port": 443}]}, "network_access[0]", '"10.0.0.1:tcp/443"'),
    ({"network_access": [{"10.0.0.0/8": "tcp/443"}]}, "network_access[0]", "without a space after the colon"),
    ({"network_access": [{"port": 10**400}]}, "network_access[0]", "quotes"),
    ({"command_whitelist": "ls, cat"}, "command_whitelist", "write ['ls', 'cat']"),
    ({"resource_limits": {"pids": "unlimited"}}, "resource_limits.pids", "leave the field away"),
    ({"resource_limits": "none"}, "resource_limits", "leave the field away"),
    ({"network_access": "dns"}, "network_access", "['dns']"),
    ({"dns": True}, "dns", "network_access"),
    ({"resource_limits": {"memory": "2g"}}, "resource_limits.memory", "did you mean 2GiB?"),
    ({"resource_limits": {"memory": "2Gi"}}, "resource_limits.memory", "did you mean 2GiB?"),
    ({"resource_limits": {"memory": 2}}, "resource_limits.memory", "write the unit"),
    ({"resource_limits": {"memory": "50%"}}, "resource_limits.memory", "not a share"),
    ({"resource_limits": {"memory": "unlimited"}}, "resource_limits.memory", "leave the field away"),
    ({"resource_limits": {"memory": "0512M"}}, "resource_limits.memory", "did you mean 512MiB?"),
    ({"resource_limits": {"disk_io": {"read_bps": "50MB/s"}}}, "resource_limits.disk_io.read_bps", "50MB?"),
    ({"resource_limits": {"cpu": 150}}, "resource_limits.cpu", '"150%"'),
    ({"resource_limits": {"cpu": "500m"}}, "resource_limits.cpu", '"50%"'),
    ({"resource_limits": {"cpu": "2 cores"}}, "resource_limits.cpu", "2 (cores)"),
    ({"resource_limits": {"cpu": "08"}}, "resource_limits.cpu", "like"),
    ({"resource_limits": {"cpu": "0150%"}}, "resource_limits.cpu", "like"),
    ({"resource_limits": {"pids": "256"}}, "resource_limits.pids", "without quotes"),
    ({"resource_limits": {"ram": "2GiB"}}, "resource_limits.ram", "memory: 2GiB"),
    ({"resource_limits": {"nproc": 5}}, "resource_limits.nproc", "pids: 256"),
    ({"resource_limits": ["cpu"]}, "resource_limits", "resource_limits: {"),
    ({"memory": "2GiB"}, "memory", "belongs under resource_limits"),
    ({"cpu": 2}, "cpu", "belongs under resource_limits"),
    ({"commands": ["ls"]}, "commands", "command_whitelist"),
    ({"whitelist": ["ls"]}, "whitelist", "command_whitelist"),
    ({"comand_whitelist": ["ls"]}, "comand_whitelist", "did you mean 'command_whitelist'?"),
    ({"deny": ["ls"]}, "deny", '"!git push **"'),
    ({"users": ["alice"]}, "users", "belongs in a Policy"),
    ({"hours": "9-17"}, "hours", "belongs in a Policy"),
    ({"spec": {}}, "spec", "beside 'kind'"),
    ({"version": 2}, "version", "counts versions itself"),
    ({"Priority": 5}, "Priority", "did you mean 'priority'?"),
    ({"priority": "high"}, "priority", ""),
    ({"priority": "50"}, "priority", "without quotes"),
    ({"on_revoke": "Kill"}, "on_revoke", "did you mean 'kill'?"),
    ({"name": "Data Analyst"}, "name", "did you mean 'Data-Analyst'?"),
    ({"name": ["A"]}, "name", "one name"),
    ({"name": 42}, "name", "quotes"),
    ({"name": "A\n"}, "name", "did you mean 'A'?"),
    ({"description": "two\nlines\n"}, "description", ">-"),
    ({"command_whitelist": "ls"}, "command_whitelist", "['ls']"),
    ({"dependencies": ["postgresql-client>=15"]}, "dependencies[0]", "(>= 15)"),
    ({"dependencies": ["nginx.service"]}, "dependencies[0]", "service:nginx"),
    ({"dependencies": ["nginx:amd64"]}, "dependencies[0]", "without architecture"),
    ({"dependencies": [{"service": "cron"}]}, "dependencies[0]", "service:cron"),
]
IN_POLICY = [
    ({"subjects": {"user": "alice"}}, "subjects.user", "users: [alice]"),
    ({"subjects": {"users": "alice"}}, "subjects.users", "['alice']"),
    ({"subjects": ["alice"]}, "subjects", "subjects: {users: [alice]"),
    ({"subjects": {"users": ["@analysts"]}}, "subjects.users[0]", "groups"),
    ({"subjects": {"users": ["%analysts"]}}, "subjects.users[0]", "groups"),
    ({"subjects": {"users": ["alice,bob"]}}, "subjects.users[0]", "one name an entry"),
    ({"subjects": {"users": ["a*"]}}, "subjects.users[0]", "no wildcards"),
    ({"subjects": {"users": [1000]}}, "subjects.users[0]", "not the number"),
    ({"group": ["analysts"]}, "group", "groups: [analysts]"),
    ({"users": ["alice"]}, "users", "subjects: {users"),
    ({"vm": "web-1"}, "vm", "vms: "),
    ({"vms": "web-1"}, "vms", "['web-1']"),
    ({"vms": [1.1]}, "vms[0]", "quotes"),
    ({"hours": "9-17"}, "hours", "when: {hours"),
    ({"when": "Mon-Fri 09:00-17:00"}, "when", "when: {hours"),
    ({"when": {"hours": "9-17"}}, "when.hours", '"09:00-17:00"'),
    ({"when": {"hours": "9:00-17:00"}}, "when.hours", '"09:00-17:00"'),
    ({"when": {"hours": "Mon\u2013Fri 09:00\u201317:00"}}, "when.hours", '"Mon-Fri 09:00-17:00"'),
    ({"when": {"hours": "9am-5pm"}}, "when.hours", '"09:00-17:00"'),
    ({"when": {"hours": "weekdays 9-17 Europe/Berlin"}}, "when.hours", '"Mon-Fri 09:00-17:00 Europe/Berlin"'),
    ({"when": {"hours": "Monday-Friday 08:00-17:00"}}, "when.hours", '"Mon-Fri 08:00-17:00"'),
    ({"when": {"hours": "Mon-Fri"}}, "when.hours", '"Mon-Fri 00:00-24:00"'),
    ({"when": {"hours": ["09:00-17:00"]}}, "when.hours", "second policy"),
    ({"when": {"hours": 930}}, "when.hours", "in quotes"),
    ({"when": {"load": 70}}, "when.load", "host_load: {cpu: {below: 70}}"),
    ({"when": {"host_load": 70}}, "when.host_load", "host_load: {cpu: {below: 70}}"),
    ({"when": {"host_load": {"cpu": 80}}}, "when.host_load.cpu", "cpu: {below: 80}"),
    ({"when": {"host_load": {"cpu": {"below": "70%"}}}}, "when.host_load.cpu.below", "without quotes and '%': 70"),
    ({"when": {"vm_health": {"clock_skew_below": "1_0s"}}}, "when.vm_health.clock_skew_below", "like 5s"),
    ({"when": {"vm_health": {"disk_free_above": "010%"}}}, "when.vm_health.disk_free_above", "like 10%"),
    ({"when": {"host_load": {"cpu": "80%"}}}, "when.host_load.cpu", "cpu: {below: 80}"),
    ({"when": {"host_load": {"cpu": 10**400}}}, "when.host_load.cpu", "cpu: {below: 70}"),
    ({"when": {"host_load": {"disk": 50}}}, "when.host_load.disk", "disk: {below: 50}"),
    ({"when": {"host_load": {"psi": 50}}}, "when.host_load.psi", "pressure"),
    ({"when": {"vm_health": "ok"}}, "when.vm_health", "disk_free_above"),
    ({"persona": "A, B"}, "persona", "one name"),
    ({"persona": ["A", "B"]}, "persona", "one name"),
    ({"personas": ["A", "B"]}, "personas", "persona: NAME"),
    ({"command_whitelist": ["ls"]}, "command_whitelist", "belongs in a Persona"),
]


@pytest.mark.parametrize(
    ("base", "fields", "path", "fix"),
    [(PERSONA, *case) for case in IN_PERSONA] + [(POLICY, *case) for case in IN_POLICY],
    ids=lambda value: str(value) if isinstance(value, dict) and "kind" not in value else "",
)
def test_what_people_write_is_refused_with_what_they_meant(
    base: dict[str, Any], fields: dict[str, Any], path: str, fix: str
) -> None:
    with pytest.raises(DocumentError) as error:
        parse_document({**copy.deepcopy(base), **fields})
    assert [(finding.path, fix in finding.fix) for finding in error.value.findings if finding.path == path] == [
        (path, True)
    ], error.value.message


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"kind": "persona"}, "did you mean 'Persona'?"),
        ({"kind": "Polcy"}, "did you mean 'Policy'?"),
        ({"Kind": "Persona"}, "not 'Kind'"),
        ("kind:Persona", "with a space after the colon"),
        ([{"kind": "Persona"}], "'---', not written as a list"),
    ],
)
def test_a_kind_that_is_none(document: Any, said: str) -> None:
    with pytest.raises(DocumentError) as error:
        parse_document(document)
    assert said in error.value.message


def test_of_what_is_refused_as_a_whole_nothing_is_missing() -> None:
    for fields in ({"when": {"host_load": {"cpu": 70}}}, {"subjects": "alice"}):
        with pytest.raises(DocumentError) as error:
            parse_document({**POLICY, **fields})
        assert len(error.value.findings) == 1


@pytest.mark.parametrize("guess", [bytes_meant, cpu_meant, rule_meant, dependency_meant, hours_meant])
@given(ANYTHING)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_guess_is_one_line_whatever_it_is_about(guess: Callable[[Any], str], value: Any) -> None:
    said = guess(value)
    assert said
    assert len(said) < 700
    of_persona("resource_limits.memory", value), of_policy("when.host_load.cpu", value)


@pytest.mark.parametrize("pattern", ["[", "[ -f *", "/usr/bin/[", "![ **"])
def test_a_program_is_named_like_a_wildcard(pattern: str) -> None:
    parsed = parse_pattern(pattern)
    assert parsed.key in ("[", "/usr/bin/[")


@pytest.mark.parametrize("pattern", ["l[s]", "[ab]", "*", "l?"])
def test_a_bare_name_still_takes_no_wildcard(pattern: str) -> None:
    with pytest.raises(Bad):
        parse_pattern(pattern)


@pytest.mark.parametrize(
    "name",
    ["ssh.socket", "a.timer", "a.target", "a.mount", "a.path", "a.slice", "a.scope", "a.device", "a.swap",
     "a.automount", "a.socket.service", "a.service.service", "getty@", "getty@.service", "@a", ".service", "."],
)  # fmt: skip
def test_a_service_that_can_never_be_active(name: str) -> None:
    with pytest.raises(Bad):
        parse_dependency(f"service:{name}")


@pytest.mark.parametrize(
    "name", ["ssh", "getty@tty1", "dbus-org.freedesktop.resolve1", "openvpn@a.b", "systemd-fsck@x"]
)
def test_names_of_services(name: str) -> None:
    assert str(parse_dependency(f"service:{name}")) == str(parse_dependency(f"service:{name}.service"))


@pytest.mark.parametrize("name", ["ssh.socket", "cron.timer", "nginx.service"])
def test_a_unit_is_no_package(name: str) -> None:
    with pytest.raises(Bad):
        parse_dependency(name)
