"""Writes documents as YAML that ``reader`` reads back to the same documents."""

import re
from collections.abc import Iterable

import yaml

from persona.canonical import as_written
from persona.documents import Document

_WIDE = 1 << 20  # no line is joined from two, which the reader refuses
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9 _./-]*")


class _Dumper(yaml.SafeDumper):
    """Puts everything in quotes that YAML, the reader or a person might take for something else."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if _PLAIN.fullmatch(text) else '"')


_Dumper.add_representer(str, _quoted)


def as_yaml(documents: Iterable[Document]) -> str:
    """One stream of documents."""
    fields = map(as_written, documents)
    return yaml.dump_all(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDE)
