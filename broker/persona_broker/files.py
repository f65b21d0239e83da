"""Reads personas and policies from YAML or JSON files, and says where in the file what is wrong."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from persona.documents import Document, check_set, parse_document
from persona.parsing import DocumentError, Finding

FILE_MAX = 4 * 1024 * 1024
_SUFFIXES = (".yaml", ".yml", ".json")
_DEPTH_MAX = 20
_VALUES_MAX = 100_000  # of one document
Lines = dict[str, int]


@dataclass(frozen=True, slots=True)
class Located:
    """A finding with its place; no line where it is about the whole file."""

    file: str
    line: int | None
    finding: Finding

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.file}: {self.finding.message}"
        return f"{self.file}:{self.line}: {self.finding}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The documents that could be read, in order, how many there are, and everything that is wrong with any."""

    documents: tuple[Document, ...]
    count: int
    problems: tuple[Located, ...]


def load(paths: Iterable[Path]) -> Loaded:
    """Reads files, and directories' ``*.yaml``, ``*.yml`` and ``*.json`` in order of their names."""
    found: list[tuple[Document, str, Lines]] = []
    problems: list[Located] = []
    count = 0
    files = _files(paths, problems)
    for file in files:
        try:
            text = _read(file)
            nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            problems.append(Located(str(file), None, Finding("", said)))
            continue
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or "cannot be read as YAML or JSON"
            began = getattr(error, "context_mark", None)
            if began is not None and mark is not None and began.line != mark.line:
                problem = f"{problem}, {getattr(error, 'context', '')} that began in line {began.line + 1}"
            problems.append(Located(str(file), mark.line + 1 if mark else 1, Finding("", problem)))
            continue
        count += len(nodes)
        for node in nodes:
            lines: Lines = {}
            try:
                value = _value(node, "", lines, 0)
                found.append((parse_document(value), str(file), lines))
            except DocumentError as error:
                problems += [Located(str(file), _line(item.path, lines), item) for item in error.findings]
    for document, finding in check_set(document for document, _, _ in found):
        _, where, lines = next(item for item in reversed(found) if item[0] is document)
        problems.append(Located(where, _line(finding.path, lines), finding))
    order = {str(file): index for index, file in enumerate(files, 1)}
    problems.sort(key=lambda problem: (order.get(problem.file, 0), problem.line or 0))
    return Loaded(tuple(document for document, _, _ in found), count, tuple(problems))


def _files(paths: Iterable[Path], problems: list[Located]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
            files += inside
            if not inside:
                problems.append(Located(str(path), None, Finding("", f"no {', '.join(_SUFFIXES)} file inside")))
        else:
            files.append(path)
    return files


def _read(file: Path) -> str:
    with file.open("rb") as opened:
        data = opened.read(FILE_MAX + 1)
    if len(data) > FILE_MAX:
        raise ValueError(f"larger than {FILE_MAX} bytes")
    return data.decode("utf-8")


def _line(path: str, lines: Lines) -> int:
    while path and path not in lines:
        path = path.rpartition("[" if path.endswith("]") else ".")[0]
    return lines.get(path, lines.get("", 1))


def _value(node: yaml.Node | None, path: str, lines: Lines, depth: int) -> Any:
    """A plain value of a composed node, its lines noted; a key that is there twice is refused."""
    if node is None:
        return None
    lines[path] = node.start_mark.line + 1
    if depth > _DEPTH_MAX or len(lines) > _VALUES_MAX:  # aliases can make a small file huge
        raise DocumentError([Finding(path, "nested too deeply, or too many values")])
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            where = f"{path}.{key}" if path else key
            if key in mapping:
                lines[where] = key_node.start_mark.line + 1
                raise DocumentError([Finding(where, "is there twice", "remove one")])
            mapping[key] = _value(value_node, where, lines, depth + 1)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{path}[{index}]", lines, depth + 1) for index, item in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node)
