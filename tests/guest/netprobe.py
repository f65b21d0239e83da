"""What a program can reach, tried for real: run as a program of its own, in a namespace, a cgroup or a guest.

``netprobe.py serve PORT... ADDRESS...`` greets on TCP and echoes on UDP at these ports, at all addresses
where none is given, and prints ``ready``.  ``netprobe.py try`` reads a JSON list of [kind, host, port] and
prints a list of outcomes: ``ok``, an errno's name, or ``silence``.  ``netprobe.py hold HOST PORT`` opens a flow of
TCP and one of UDP, prints ``open``, and for each line that it reads how both fare.  Standard library only.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time

TIMEOUT = 3.0
GREETING = b"hello\n"
UDPLITE = 136
EVERYWHERE = ["0.0.0.0", "::"]  # noqa: S104 - that is what is tested


def serve(ports: list[int], addresses: list[str]) -> None:
    """Until killed."""
    selector = selectors.DefaultSelector()
    for port in ports:
        for address in addresses or EVERYWHERE:
            family = family_of(address)
            for kind, protocol in ((socket.SOCK_STREAM, 0), (socket.SOCK_DGRAM, 0), (socket.SOCK_DGRAM, UDPLITE)):
                try:
                    sock = socket.socket(family, kind, protocol)
                except OSError:
                    if protocol == UDPLITE:  # newer kernels have none
                        continue
                    raise
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    sock.listen(64)
                selector.register(sock, selectors.EVENT_READ, (sock, kind))
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            sock, kind = key.data
            if kind == socket.SOCK_DGRAM:
                data, peer = sock.recvfrom(2048)
                with contextlib.suppress(OSError):  # refused: what the other side must notice
                    sock.sendto(data, peer)
            else:
                connection, _ = sock.accept()
                threading.Thread(target=echo, args=(connection,), daemon=True).start()


def echo(connection: socket.socket) -> None:
    """Greets, then sends back whatever comes."""
    with contextlib.suppress(OSError), connection:  # it may be cut
        connection.sendall(GREETING)
        while data := connection.recv(4096):
            connection.sendall(data)


def attempt(kind: str, host: str, port: int) -> str:
    """One try."""
    try:
        return KINDS[kind](host, port)
    except TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def family_of(host: str) -> socket.AddressFamily:
    """By the colon."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def tcp(host: str, port: int) -> str:
    """Connects and is greeted."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((host, port))
        return "ok" if sock.recv(16) == GREETING else "no greeting"


def tcp_mapped(host: str, port: int) -> str:
    """The same to an IPv4-mapped address of an IPv6 socket."""
    return tcp(f"::ffff:{host}", port)


def udp(host: str, port: int) -> str:
    """Sends a datagram and hears its echo."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((host, port))
        sock.send(b"x")
        return "ok" if sock.recv(16) == b"x" else "no echo"


def udplite(host: str, port: int) -> str:
    """The same by UDP-Lite."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM, UDPLITE) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((host, port))
        sock.send(b"x")
        return "ok" if sock.recv(16) == b"x" else "no echo"


def udp_unconnected(host: str, port: int) -> str:
    """The same by sendto."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.sendto(b"x", (host, port))
        return "ok" if sock.recv(16) == b"x" else "no echo"


def udp_mapped(host: str, port: int) -> str:
    """The same to an IPv4-mapped address."""
    return udp(f"::ffff:{host}", port)


def dns(host: str, _port: int) -> str:
    """UDP to port 53."""
    return udp(host, 53)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = int(sum(struct.unpack(f">{len(data) // 2}H", data)))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def echo_request(host: str) -> tuple[bytes, int]:
    """An ICMP or ICMPv6 echo request, and the protocol's number."""
    if ":" in host:
        return struct.pack(">BBHHH", 128, 0, 0, os.getpid() & 0xFFFF, 1) + b"data", socket.IPPROTO_ICMPV6
    head = struct.pack(">BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1) + b"data"
    return head[:2] + struct.pack(">H", checksum(head)) + head[4:], socket.IPPROTO_ICMP


def ping(host: str, _port: int) -> str:
    """An echo by a ping socket, icmp(7)."""
    return _ping(host, socket.SOCK_DGRAM)


def raw_ping(host: str, _port: int) -> str:
    """An echo by a raw socket."""
    return _ping(host, socket.SOCK_RAW)


def _ping(host: str, kind: int) -> str:
    packet, protocol = echo_request(host)
    with socket.socket(family_of(host), kind, protocol) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((host, 0))
        sock.send(packet)
        return "ok" if sock.recv(256) else "nothing"


def raw_tcp(host: str, port: int) -> str:
    """A SYN of one's own making by a raw socket: ``ok`` if it went out."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as sock:
        sock.connect((host, 0))
        sock.send(struct.pack(">HHIIBBHHH", 40000, port, 1, 0, 0x50, 0x02, 1024, 0, 0))
        return "ok"


def packet(_host: str, _port: int) -> str:
    """Whether a packet socket can be had."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW):
        return "ok"


KINDS = {
    "tcp": tcp, "tcp_mapped": tcp_mapped, "udp": udp, "udp_unconnected": udp_unconnected, "udp_mapped": udp_mapped,
    "udplite": udplite, "dns": dns, "ping": ping, "raw_ping": raw_ping, "raw_tcp": raw_tcp, "packet": packet,
}  # fmt: skip


def stream(host: str, port: int) -> None:
    """Keeps a flow busy; prints ``open``, and the seconds (Unix) and the error when it is cut."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect((host, port))
        sock.recv(16)
        print("open", flush=True)
        try:
            while True:
                sock.sendall(b"x")
                sock.recv(16)
                time.sleep(0.01)
        except OSError as error:
            print(time.time(), errno.errorcode.get(error.errno or 0, str(error)), flush=True)


def hold(host: str, port: int) -> None:
    """Until its input ends."""
    with (
        socket.socket(family_of(host), socket.SOCK_STREAM) as flow,
        socket.socket(family_of(host), socket.SOCK_DGRAM) as datagrams,
    ):
        for sock in (flow, datagrams):
            sock.settimeout(TIMEOUT)
            sock.connect((host, port))
        flow.recv(16)
        print("open", flush=True)
        for _ in sys.stdin:
            print(json.dumps([fares(flow), fares(datagrams)]), flush=True)


def fares(sock: socket.socket) -> str:
    """Whether it still gets an echo."""
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # what came of the last time
    try:
        sock.send(b"x")
        return "ok" if sock.recv(16) == b"x" else "no echo"
    except TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def main() -> None:
    """See the module."""
    if sys.argv[1] == "serve":
        words = sys.argv[2:]
        serve([int(word) for word in words if word.isdigit()], [word for word in words if not word.isdigit()])
    elif sys.argv[1] == "stream":
        stream(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1] == "hold":
        hold(sys.argv[2], int(sys.argv[3]))
    else:
        print(json.dumps([attempt(*item) for item in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
