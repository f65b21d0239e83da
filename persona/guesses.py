"""What people write in place of what a document takes, and what to tell them.

Only called for a value that is refused already: nothing here decides, and whatever it is given it
returns one line of advice and raises nothing.
"""

import ipaddress
import re
from typing import Any

from persona.parsing import shown

RULES = "like 10.20.0.0/16:tcp/5432, any:tcp/443, icmp, dns or in:any:tcp/8080"
_NO_LIMIT = ("unlimited", "none", "max", "infinity", "inf", "-1", "no", "off", "any", "0", "")
_BYTES = re.compile(r"0*(\d{1,15}(?:[.,]\d{1,15})?)\s*([kmgt]?)(?:i?b?|bytes?)(/s)?", re.ASCII | re.IGNORECASE)
_CORES = re.compile(r"(\d{1,3}(?:[.,]\d{1,3})?)\s*(?:v?cpus?|cores?|c)", re.ASCII)
_MILLICORES = re.compile(r"([1-9]\d{0,6})m", re.ASCII)
_SERVICE = re.compile(r":(?:tcp|udp)/[0-9*,-]+$", re.ASCII)
_PORT = re.compile(r"\*|[1-9][0-9]{0,4}(?:[,-][1-9][0-9]{0,4})*", re.ASCII)
_PORTED = re.compile(r"(?:\[([0-9a-f.:]+)\]|([0-9.]+(?:/\d{1,2})?))(?::(\d{1,5}))?", re.ASCII)
_DOTTED = re.compile(r"((?:\d{1,3}\.){1,3})(?:\*\.?)+", re.ASCII)
_HOST = re.compile(
    r"(?:([a-z]+)://)?([a-z0-9*_-]+(?:\.[a-z0-9_-]+)*)(?::(?:(?:tcp|udp)/)?([0-9]{1,5}))?(?:/.*)?", re.ASCII
)
_NAMED = {"ssh": 22, "smtp": 25, "http": 80, "ntp": 123, "https": 443, "ldap": 389, "mysql": 3306, "postgresql": 5432}
_WORDS = {
    "*": "write {in}any", "all": "write {in}any", "internet": "write {in}any", "*:*": "write {in}any",
    "anywhere": "write {in}any", "everything": "write {in}any", "any:any": "write {in}any", "any:*": "write {in}any",
    "": "an empty list, [], is nobody", "none": "an empty list, [], is nobody", "no": "an empty list, [], is nobody",
    "localhost": "loopback is always open: leave it away", "loopback": "loopback is always open: leave it away",
    "lo": "loopback is always open: leave it away",
    "ping": "write icmp", "icmpv6": "write icmp", "icmp6": "write icmp", "any:icmp": "write icmp",
    "dns:53": "write dns", "any:dns": "write dns", "any:udp/dns": "write dns",
}  # fmt: skip


def bytes_meant(value: Any) -> str:
    """For who wrote an amount of bytes in another way."""
    text = str(value).strip() if isinstance(value, str) or (type(value) is int and abs(value) < 1 << 70) else "?"
    if text.lower() in _NO_LIMIT:
        return "for no limit leave the field away"
    if text.endswith("%"):
        return "bytes, not a share of what there is: like 2GiB"
    match = _BYTES.fullmatch(text[:80])
    if match is None:
        return "like 2GiB, 512MiB or 50MB"
    unit = match[2].upper()
    # rates are counted in thousands
    return f"did you mean {match[1].replace(',', '.')}{unit}{'iB' if unit and not match[3] else 'B'}?"


def cpu_meant(value: Any) -> str:
    """For who wrote an amount of CPU in another way."""
    text = value.strip().lower() if isinstance(value, str) else "-1" if _below_1(value) else "?"
    if text in _NO_LIMIT:
        return "for no limit leave the field away"
    if milli := _MILLICORES.fullmatch(text):  # as Kubernetes counts
        return f'did you mean "{int(milli[1]) / 10:g}%"?'
    if cores := _CORES.fullmatch(text):
        return f"did you mean {float(cores[1].replace(',', '.')):g} (cores)?"
    return 'like "150%" or 1.5 (cores)'


def _below_1(value: Any) -> bool:
    return type(value) in (int, float) and value <= 0


def rule_meant(value: Any) -> str:
    """For who wrote a network rule in another way."""
    if isinstance(value, dict):
        return _rule_of_fields(value)
    if type(value) is int:
        value = str(value) if 0 < value < 65536 else ""
    if not isinstance(value, str) or len(value) > 512:
        return f"one rule is one text in quotes, {RULES}"
    text = value.partition(" via ")[0].strip().lower()
    inbound = "in:" if text.startswith("in:") else ""
    text = text.removeprefix("in:").strip()
    if text in _WORDS:
        return _WORDS[text].replace("{in}", inbound)
    if text.startswith(("!", "deny", "not ")):
        return "rules only allow: what no rule lists cannot be reached"
    return _port_meant(text, inbound) or _address_meant(text, inbound) or _host_meant(text, inbound) or RULES


def _rule_of_fields(fields: dict[Any, Any]) -> str:
    """The rule for what was written as a mapping: {host: 10.0.0.1, port: 443}, or 10.0.0.0/8: tcp/443."""
    usual = f"one rule is one text in quotes, {RULES}"
    plain = [(key, value) for key, value in list(fields.items())[:8] if isinstance(value, (str, int))]
    texts = {str(key)[:80].lower(): shown(value).strip("'") for key, value in plain}
    if len(fields) == 1 and len(texts) == 1:
        ((key, value),) = texts.items()
        return f'without a space after the colon, in quotes: "{key}:{value}"' if value[:3] in ("tcp", "udp") else usual
    where = next((texts[key] for key in ("cidr", "address", "ip", "host", "network", "to") if key in texts), "any")
    port = next((texts[key] for key in ("port", "ports") if key in texts), "")
    protocol = next((texts[key].lower() for key in ("protocol", "proto") if key in texts), "tcp")
    return f'one text in quotes: "{where}:{protocol}/{port}"' if port and protocol in ("tcp", "udp") else usual


def _port_meant(text: str, inbound: str) -> str:
    """The rule for a port with no address, in any order: 443, tcp/443, 443/tcp, tcp:443, any:443, any:tcp/https."""
    words = [word for word in re.split("[/:]", text) if word not in ("", "*", "any", "0.0.0.0")]  # noqa: S104
    protocols = [word for word in words if word in ("tcp", "udp")]
    ports = [str(_NAMED.get(word, word)) for word in words if word not in ("tcp", "udp")]
    if not words or len(protocols) > 1 or len(ports) > 1:
        return ""
    port = (ports or ["*"])[0]
    if not _PORT.fullmatch(port) or any(int(part) > 65535 for part in re.findall(r"\d+", port)):
        return ""
    return f"for that port anywhere write {inbound}any:{(protocols or ['tcp'])[0]}/{port}"


def _address_meant(text: str, inbound: str) -> str:
    """The rule for an address as other programs take it: 10.0.0.5:5432, [2001:db8::1]:443, 10.20.*, 10.20.0.1/16."""
    service = _SERVICE.search(text)
    tail = service[0] if service else ""
    text = text.removesuffix(tail)
    if dotted := _DOTTED.fullmatch(text):
        numbers = dotted[1].rstrip(".").split(".")
        text = ".".join(numbers + ["0"] * (4 - len(numbers))) + f"/{8 * len(numbers)}"
    elif (ported := _PORTED.fullmatch(text)) and not (tail and ported[3]):
        text, tail = ported[1] or ported[2], f":tcp/{ported[3]}" if ported[3] else tail
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return ""
    alone = str(network.network_address) if network.num_addresses == 1 else str(network)
    return f"write {inbound}{alone}{tail}"


def _host_meant(text: str, inbound: str) -> str:
    match = _HOST.fullmatch(text)
    if match is None or not any(map(str.isalpha, match[2])) or match[2] in ("tcp", "udp", "any", "dns", "icmp"):
        return ""
    port = match[3] or _NAMED.get(match[1] or "", 443)
    return f"names are not looked up: write the addresses, or {inbound}any:tcp/{port} for that port anywhere"


def dependency_meant(value: Any) -> str:
    """For who wrote a package or a service in another way."""
    usual = "like 'postgresql-client (>= 15)' or 'service:cron'"
    if isinstance(value, dict) and len(value) == 1:
        (key, name) = next(iter(value.items()))
        if key == "service" and isinstance(name, str):
            return f"without a space after the colon: service:{name[:80]}"
    if not isinstance(value, str):
        return f"one dependency is one text in quotes, {usual}"
    text = value.strip()[:200]
    if "|" in text:
        return "alternatives are not known: name the package that is to be there"
    if "," in text:
        return "one package an entry"
    if relation := re.fullmatch(
        r"([a-z0-9][a-z0-9+.-]*)\s*\(?\s*(<<|<=|==?|>=|>>|<|>)\s*([0-9][\w.+:~-]*)\s*\)?", text, re.ASCII
    ):
        sign = {"<": "<<", ">": ">>", "==": "="}.get(relation[2], relation[2])
        return f"write '{relation[1]} ({sign} {relation[3]})'"
    if re.fullmatch(r"[\w@.-]+\.(?:service|socket|timer|target|mount|path)", text, re.ASCII):
        return f"write 'service:{text.rpartition('.')[0]}'"
    if text.startswith("service"):
        return "write service:NAME, as in 'systemctl status NAME'"
    if ":" in text:
        return f"packages are named without architecture or source, {usual}"
    return f"Debian's names have small letters, {usual}" if text != text.lower() else usual


def hours_meant(value: Any) -> str:
    """For who wrote a window of time in another way."""
    usual = 'like "Mon-Fri 07:00-20:00 Europe/Berlin"'
    if isinstance(value, list):
        return "one window; a second policy has another one"
    if not isinstance(value, str):
        return f"in quotes, {usual}"
    text = value.strip()[:80].replace("\u2013", "-")  # an en dash, as word processors make it
    if text.lower() in ("always", "24/7", "any", "*"):
        return "for always leave the field away"
    times = _TIMES.fullmatch(text)
    days = _days_meant(times["days"] if times else text)
    if days is None:
        return usual
    if times is None:
        return f'did you mean "{days} 00:00-24:00"?' if days else usual
    first, last = int(times["from"]), int(times["to"])
    if (times["pm"] or "").lower() == "pm" and last < 12:
        last += 12
    if first > 24 or last > 24:
        return usual
    window = f"{first:02}:{times['from_minute'] or '00'}-{last:02}:{times['to_minute'] or '00'}"
    return f'did you mean "{days + " " if days else ""}{window}{times["zone"] or ""}"?'


_TIMES = re.compile(
    r"(?P<days>.*?)\b(?P<from>\d{1,2})(?:[:.h](?P<from_minute>\d\d))?\s*(?:h|am)?\s*(?:-|to|until)\s*"
    r"(?P<to>\d{1,2})(?:[:.h](?P<to_minute>\d\d))?\s*(?P<pm>h|pm)?(?P<zone>\s+[\w/+-]+)?",
    re.ASCII | re.IGNORECASE,
)
_DAYS = {day.lower(): day for day in ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")}


def _days_meant(text: str) -> str | None:
    """Days as ``hours`` takes them, ``""`` for none named, ``None`` where they are not understood."""
    plain = text.strip(" :,").lower()
    plain = {"weekdays": "mon-fri", "workdays": "mon-fri", "weekend": "sat-sun", "daily": ""}.get(plain, plain)
    found = []
    for part in re.split(r"(\s*[,-]\s*|\s+)", plain) if plain else []:
        if part[:3] in _DAYS and part.isalpha():
            found.append(_DAYS[part[:3]])
        elif part.strip() in ("-", ",", ""):
            found.append(part.strip() or ",")
        else:
            return None
    return "".join(found)


# --- fields -----------------------------------------------------------------------------------------

_WHITELIST = "what may run is 'command_whitelist: [ls, git]'"
_LIMITS = "it belongs under resource_limits: 'resource_limits: {cpu: \"150%\", memory: 2GiB, pids: 256}'"
_NETWORK = "what may be reached is 'network_access: [\"any:tcp/443\", dns]'"
_NEEDS = "what the VM must have is 'dependencies: [nginx, \"service:cron\"]'"
_POLICY = "it belongs in a Policy, which says who gets the persona, where and when"
_PERSONA = "it belongs in a Persona; a Policy names that with 'persona: NAME'"
_SUBJECTS = "who it is for is 'subjects: {users: [alice], groups: [analysts]}'"
_VMS = "where it holds is 'vms: [\"web-*\"]'"
_WHEN = "conditions are 'when: {hours: \"Mon-Fri 07:00-20:00\", host_load: {cpu: {below: 70}}}'"
_TOP = "the fields stand beside 'kind', none below 'spec' or 'metadata'"
_CARVE = "refuse commands with '!' in the list that allows them: [git, \"!git push **\"]"
_VERSION = "leave it away: the broker counts versions itself"


def _by(*pairs: tuple[str, str]) -> dict[str, str]:
    return {name: advice for names, advice in pairs for name in names.split()}


_ANYWHERE = _by(
    ("kind", "write 'kind', in small letters"),
    ("name", "write 'name', in small letters"),
    ("spec metadata apiversion api_version", _TOP),
    ("blacklist command_blacklist deny denied forbid except exclude not_allowed", _CARVE),
    ("version revision id", _VERSION),
    ("<<", "merge keys are not understood: write the fields out"),
    ("extends inherits base parent include import", "documents do not include each other: write the fields out"),
    ("desc comment title notes", "text for people is 'description'"),
)
_IN_PERSONA = _ANYWHERE | _by(
    ("commands command whitelist allow allowed allowed_commands programs program commandlist command_list", _WHITELIST),
    ("limits limit resources resource cpu cpus cores memory mem ram pids processes disk io disk_io quota", _LIMITS),
    ("network networks net ports port egress ingress outbound allow_network firewall internet dns hosts", _NETWORK),
    ("depends deps packages package requires needs services service units apt", _NEEDS),
    ("prio weight nice importance", "its weight is 'priority: 50', 0 to 1000"),
    ("users user subjects subject groups group vms vm when hours conditions persona roles", _POLICY),
    ("revoke onrevoke when_revoked", "what becomes of running programs is 'on_revoke: finish'"),
)  # fmt: skip
_IN_POLICY = _ANYWHERE | _by(
    ("users user group groups subject who members role roles principals", _SUBJECTS),
    ("vm host hosts machines machine guests guest servers targets where", _VMS),
    ("hours time times schedule host_load load cpu vm_health health conditions condition if only_when", _WHEN),
    ("command_whitelist whitelist resource_limits limits network_access dependencies on_revoke memory", _PERSONA),
    ("command programs", "the commands that it speaks for are 'commands: [\"**\"]'"),
    ("personas grant grants gives role allow", "what it hands out is 'persona: NAME', one"),
)  # fmt: skip
_BELOW = {
    "resource_limits": _by(
        ("mem ram memory_max memory_limit", "write 'memory: 2GiB'"),
        ("cpus cores cpu_percent cpu_quota vcpu vcpus", "write 'cpu: \"150%\"' (of one core) or 'cpu: 1.5' (cores)"),
        ("processes nproc max_procs threads tasks pids_max", "write 'pids: 256'"),
        ("disk io disk_bps blkio", "write 'disk_io: {read_bps: 50MB, write_bps: 20MB}'"),
        ("read_bps write_bps read_iops write_iops", "it belongs under disk_io: 'disk_io: {read_bps: 50MB}'"),
        ("swap nofile open_files files network disk_space time", "a persona does not limit that"),
    ),
    "resource_limits.disk_io": _by(("read", "write 'read_bps: 50MB'"), ("write", "write 'write_bps: 20MB'")),
    "subjects": _by(("user", "write 'users: [alice]'"), ("group", "write 'groups: [analysts]'")),
    "when": _by(
        ("load cpu memory network", "write 'host_load: {cpu: {below: 70}}'"),
        ("time times days schedule hour", "write 'hours: \"Mon-Fri 07:00-20:00 Europe/Berlin\"'"),
        ("health healthy", "write 'vm_health: {disk_free_above: 10%}'"),
    ),
    "when.host_load": _by(
        ("below", "of what? 'host_load: {cpu: {below: 70}}'"),
        ("mem ram", "write 'memory'"),
        ("io disk_io", "write 'disk'"),
        ("psi", "write 'pressure'"),
    ),
}
_KINDS = {
    "subjects": _SUBJECTS,
    "when": f"{_WHEN}; for always leave the field away",
    "resource_limits": "write 'resource_limits: {cpu: \"150%\", memory: 2GiB}'; for no limits leave the field away",
    "resource_limits.pids": "like 256; for no limit leave the field away",
    "resource_limits.disk_io.read_iops": "like 500; for no limit leave the field away",
    "resource_limits.disk_io.write_iops": "like 500; for no limit leave the field away",
    "priority": "like 50, the default; 100 gets twice as much",
    "when.vm_health": "write 'vm_health: {disk_free_above: \"10%\"}'",
    "resource_limits.disk_io": "write 'disk_io: {read_bps: 50MB, write_bps: 20MB}'",
    "when.host_load": "write 'host_load: {cpu: {below: 70}}'",
    "persona": "a policy hands out one persona: write a second policy for the other",
}


def of_persona(path: str, value: Any) -> str:
    """About an unknown field of a persona, or one with a value of the wrong kind; ``""`` = nothing is known."""
    return _of_field(path, value, _IN_PERSONA)


def of_policy(path: str, value: Any) -> str:
    """The same for a policy."""
    return _of_field(path, value, _IN_POLICY)


def _of_field(path: str, value: Any, top: dict[str, str]) -> str:
    above, _, name = path[:200].rpartition(".")
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if above == "when.host_load" and plain in ("cpu", "memory", "network", "disk", "pressure"):
        number = shown(value).strip("' ").removesuffix("%")
        return f"write '{plain}: {{below: {number if re.fullmatch('[1-9][0-9]?', number) else 70}}}'"
    known = _BELOW.get(above, {}) if above else top
    return known.get(plain) or _KINDS.get(path) or ""
