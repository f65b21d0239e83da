"""A certificate authority and a server certificate for one broker, made with openssl(1)."""

import ipaddress
import os
import subprocess
import tempfile
from pathlib import Path

DAYS = 825  # what TLS clients accept at most for a server


def make(directory: Path, hosts: list[str]) -> None:
    """Writes ca.pem, broker.crt and broker.key (0600).  Raises ``CalledProcessError``, ``OSError``.

    All of them or, where openssl refuses, none.  The authority's own key is not kept: it signs this one
    certificate and is gone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tls-", dir=directory) as scratch:
        _make(Path(scratch), hosts)
        for name in ("ca.pem", "broker.crt", "broker.key"):
            (Path(scratch) / name).replace(directory / name)
    (directory / "ca.key").unlink(missing_ok=True)  # of an authority that is no more


def _make(directory: Path, hosts: list[str]) -> None:
    names = ",".join(f"IP:{host}" if _is_address(host) else f"DNS:{host}" for host in hosts)
    authority = directory / "ca.key"
    previous = os.umask(0o077)
    try:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        usage = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
        _openssl(
            "req", "-x509", *curve, "-days", str(DAYS), "-subj", "/CN=persona-broker CA", *usage,
            "-keyout", str(authority), "-out", str(directory / "ca.pem"),
        )  # fmt: skip
        _openssl(
            "req", *curve, "-subj", f"/CN={hosts[0]}", "-addext", f"subjectAltName={names}",
            "-keyout", str(directory / "broker.key"), "-out", str(directory / "broker.csr"),
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", str(directory / "broker.csr"), "-copy_extensions", "copy", "-days", str(DAYS),
            "-CA", str(directory / "ca.pem"), "-CAkey", str(authority), "-CAcreateserial",
            "-out", str(directory / "broker.crt"),
        )  # fmt: skip
    finally:
        os.umask(previous)
    for name in ("ca.pem", "broker.crt"):
        (directory / name).chmod(0o644)


def _openssl(*arguments: str) -> None:
    subprocess.run(
        ["/usr/bin/openssl", *arguments],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env={"PATH": "/usr/bin:/bin"},
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
