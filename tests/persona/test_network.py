"""Network rules: what is read, what is refused with which help, and that writing and reading agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona.network import NetworkRule, Via, parse_rule
from persona.parsing import Bad

GOOD = [
    "10.20.0.0/16:tcp/5432",
    "any:tcp/443",
    "any:udp/*",
    "any",
    "2001:db8::/32",
    "2001:db8::/32:tcp/22,80-90",
    "192.0.2.7/32:udp/53",
    "icmp",
    "dns",
    "in:any:tcp/8080",
    "in:10.0.0.0/8",
    "10.20.0.0/16:tcp/5432 via 10.0.0.1",
    "10.20.0.0/16 via 10.0.0.1 dev eth1",
    "any:tcp/443 via dev eth1",
    "any:tcp/443 via 10.0.0.1",
    "dns via table 100",
    "icmp via dev wg0",
    "2001:db8::/32 via fe80::1 dev eth0",
    "2001:db8::/32 via 2001:db8::1",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_is_read_is_written_back(text: str) -> None:
    assert str(parse_rule(text)) == text


def test_an_address_is_a_prefix() -> None:
    assert parse_rule("192.0.2.7:tcp/22") == NetworkRule(False, "192.0.2.7/32", "tcp", ((22, 22),))
    assert parse_rule("  2001:db8::1   via   dev   eth1 ").via == Via(device="eth1")


BAD = [
    (7, "any:tcp/7"),
    ({"port": 7}, "quotes"),
    ("x" * 600, "quotes"),
    ("", "[], is nobody"),
    ("10.20.0.1/16", "write 10.20.0.0/16"),
    ("example.org:tcp/443", "names are not looked up"),
    ("fe80::2%eth7:tcp/22", "leave '%'"),
    ("fe80::2%eth7", "leave '%'"),
    ("fe80::%1/64", "leave '%'"),
    ("in:fe80::2%eth7", "leave '%'"),
    ("0.0.0.0/32", "'any'"),
    ("::", "'any'"),
    ("10.0.0.0/08", "write 10.0.0.0/8"),
    ("10.0.0.0/255.255.0.0", "write 10.0.0.0/16"),
    ("10.0.0.0/0.0.255.255", "write 10.0.0.0/16"),
    ("any:tcp/0443", "leading zeros"),
    ("any:tcp/80-090", "leading zeros"),
    ("any via table 0100", "via GATEWAY"),
    ("any:tcp/0", ""),
    ("any:tcp/70000", ""),
    ("any:tcp/90-80", ""),
    ("any:tcp/" + ",".join(map(str, range(1, 20))), "more rules"),
    ("any:sctp/9", "like 10.20"),
    ("in:icmp", "in:any:udp/53"),
    ("in:dns", "in:any:udp/53"),
    ("in:any:tcp/22 via dev eth1", "leave it away"),
    ("::ffff:10.0.0.0/104", "IPv4 prefix"),
    ("any via", "like 10.20"),
    ("any via nowhere", "via GATEWAY"),
    ("any via dev", "via GATEWAY"),
    ("any via dev lo", "via GATEWAY"),
    ("any via dev a/b", "via GATEWAY"),
    ("any via dev sixteen-letters0", "via GATEWAY"),
    ("any via 10.0.0.1 on eth1", "via GATEWAY"),
    ("any via 10.0.0.1 dev eth1 twice", "via GATEWAY"),
    ("any via 127.0.0.1", "router"),
    ("any via 224.0.0.1", "router"),
    ("any via fe80::1", "dev DEVICE"),
    ("any via fe80::1%eth0", "via fe80::1 dev eth0"),
    ("any via table 0", "via GATEWAY"),
    ("any via table main", "via GATEWAY"),
    ("any via table 255", "local"),
    ("any via table 21007", "21000"),
    ("2001:db8::/32 via 10.0.0.1", "IPv6 gateway"),
    ("10.0.0.0/8 via 2001:db8::1", "IPv4 gateway"),
]


@pytest.mark.parametrize(("value", "fix"), BAD)
def test_what_is_refused_says_what_would_do(value: object, fix: str) -> None:
    with pytest.raises(Bad) as error:
        parse_rule(value)
    assert fix in error.value.fix


@given(st.text(alphabet="in:anytcpudp/0123456789.,-* viadeth:f", max_size=60))
def test_whatever_is_read_reads_back_equal(text: str) -> None:
    try:
        rule = parse_rule(text)
    except Bad:
        return
    assert parse_rule(str(rule)) == rule
