"""The key that signs checkpoints: Ed25519, made when it is first needed, in a file that only the service can read."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from persona.problems import Fault, PersonaError
from persona_broker.audit.core.checkpoint import Checkpoint
from persona_broker.audit.files import give, private_directory, sync_directory

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class PublicKey:
    """``raw``: the 32 bytes of RFC 8032."""

    raw: bytes

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of its SHA-256."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def pem(self) -> str:
        """As openssl(1) reads it."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        key = Ed25519PublicKey.from_public_bytes(self.raw)
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def verifies(self, checkpoint: Checkpoint) -> bool:
        """Whether this key signed it."""
        return checkpoint.key == self.id and self.signed(checkpoint.signature, checkpoint.signed())

    def signed(self, signature: str, data: bytes) -> bool:
        """Whether this key made a signature (hexadecimal) over these bytes."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            key = Ed25519PublicKey.from_public_bytes(self.raw)
            key.verify(bytes.fromhex(signature), data)
        except (InvalidSignature, ValueError):
            return False
        return True


class SigningKey:
    """The private half; ``repr`` does not show it."""

    def __init__(self, key: "Ed25519PrivateKey") -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self._key = key
        self.public = PublicKey(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def sign(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same with this key's id and signature."""
        named = replace(checkpoint, key=self.public.id)
        return replace(named, signature=self.over(named.signed()))

    def over(self, data: bytes) -> str:
        """A signature over these bytes, hexadecimal."""
        return self._key.sign(data).hex()


def key_file(directory: Path) -> Path:
    """Where the key of an audit is: beside the database, not among what is copied for auditors."""
    return directory.parent / "audit.key"


def load(path: Path) -> SigningKey | None:
    """Reads the signing key from a file; ``None`` where the file is missing.

    Raises ``PersonaError`` where the file holds something else, ``OSError`` where it cannot be read.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        fix = "put back the one that was there; without it checkpoints are signed by another from now on"
        raise PersonaError(Fault.NOT_READY, f"{path}: this is no Ed25519 key; {fix}")
    return SigningKey(key)


def load_or_make(path: Path) -> tuple[SigningKey, bool]:
    """The key, and whether it was made just now; of several processes that make one, all get the same.

    Raises as ``load``.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    found = load(path)
    if found is not None:
        return found, False
    private_directory(path.parent)
    made = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        give(scratch)
        os.link(scratch, path)
        sync_directory(path.parent)
    except FileExistsError:
        pass  # another process was faster
    finally:
        scratch.unlink(missing_ok=True)
    found = load(path)
    if found is None:
        raise PersonaError(Fault.NOT_READY, f"{path}: it was removed just now")
    return found, True


def read_public(text: str) -> PublicKey:
    """A public key as ``audit key`` shows it: 64 hexadecimal digits, or PEM.  Raises ``ValueError``."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    if "BEGIN" not in text:
        raw = bytes.fromhex(text.strip())
        if len(raw) != 32:
            raise ValueError("expected 64 hexadecimal digits")
        return PublicKey(raw)
    key = load_pem_public_key(text.encode())
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("no Ed25519 key")
    return PublicKey(key.public_bytes(Encoding.Raw, PublicFormat.Raw))
