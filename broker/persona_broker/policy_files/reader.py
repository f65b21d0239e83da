"""Reads personas and policies from YAML or JSON files, and says where in the file what is wrong."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from persona.documents import CommandSet, Document, Persona, Policy, check_set, parse_document
from persona.parsing import DocumentError, Finding, Unread
from persona.sets import expand, pointless, used
from persona.shown import line as printable
from persona_broker.policy.cautions import Caution, cautions
from persona_broker.policy.merge import key_of
from persona_broker.policy.origin import Origin, origin
from persona_broker.policy_files.folders import TOTAL_MAX, NotUtf8, find_files, read_text
from persona_broker.policy_files.json_text import read_json
from persona_broker.policy_files.raw import VALUES_MAX, Raw, TextError
from persona_broker.policy_files.yaml_text import read_yaml

_PROBLEMS_MAX = 500  # that are said
_SAID_MAX = 2000  # characters of one
_VALUES_MAX = 5 * VALUES_MAX  # of all files
Lines = dict[str, int]


def _printable(text: str) -> str:
    """Names and values come from files: no control characters, no surrogates and no novels for the terminal."""
    text = text if len(text) <= _SAID_MAX else text[:_SAID_MAX] + "..."
    return printable(text)


@dataclass(frozen=True, slots=True)
class Located:
    """A finding with its origin; no line where it is about the whole file."""

    file: str
    line: int | None
    finding: Finding

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return _printable(f"{where}: {str(self.finding).removeprefix('document: ')}")


@dataclass(frozen=True, slots=True)
class Warned:
    """What a persona allows with more behind it than its words say, and where; it is not refused for that.

    ``lines`` are those of the entries.
    """

    file: str
    persona: str
    caution: Caution
    lines: tuple[int, ...]

    def __str__(self) -> str:
        first, named = self.lines[0], []
        for (_, text), at in zip(self.caution.entries, self.lines, strict=True):
            named.append(f"'{text}'" + ("" if at == first else f" (line {at})"))
        said = f"persona {self.persona}: {', '.join(named)}: {self.caution.message}"
        return _printable(f"{self.file}:{first}: warning: {said}")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file in a folder that was not read though it may have been meant."""

    file: str
    why: str

    def __str__(self) -> str:
        return _printable(f"{self.file}: skipped: {self.why}")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The documents that could be read, in order, how many there are, what is wrong with any, and warnings.

    ``skipped`` are files that were left out though their names say that they may have been meant.  ``origins`` says by
    kind and name where each document begins.
    """

    documents: tuple[Document, ...]
    count: int
    problems: tuple[Located, ...]
    warnings: tuple[Warned, ...]
    skipped: tuple[Skipped, ...] = ()
    origins: Mapping[tuple[str, str], Origin] = field(default_factory=dict)


class _Loader:
    """Reads one file after the other."""

    def __init__(self) -> None:
        self.found: list[tuple[Document, str, Lines]] = []
        self.problems: list[Located] = []
        self.count = 0
        # Personas that were refused: their policies have nothing else wrong with them.  None: not all are known.
        self.refused: set[str] | None = set()
        self.broken: set[str] = set()  # the same of command sets
        self._budget = TOTAL_MAX
        self._values = _VALUES_MAX

    def read(self, file: Path) -> None:
        """One file, which is refused whole or in part, or not."""
        try:
            text = read_text(file, self._budget)
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            line = error.line if isinstance(error, NotUtf8) else None
            self._refuse(Located(str(file), line, Finding("", said)))
            return
        self._budget -= len(text)
        try:
            documents = read_json(text) if file.suffix.lower() == ".json" else read_yaml(text)
        except TextError as error:
            documents = list(error.documents)
            self._refuse(Located(str(file), error.line, error.finding))
        self._values -= sum(len(raw.lines) for raw in documents)
        if self._values < 0:
            self._refuse(
                Located(str(file), None, Finding("", f"all files together have more than {_VALUES_MAX} values"))
            )
            return
        for raw in documents:
            self._document(raw, str(file))

    def _refuse(self, problem: Located) -> None:
        self.problems.append(problem)
        self.refused = None

    def _document(self, raw: Raw, file: str) -> None:
        self.count += 1
        findings = raw.findings
        if isinstance(raw.value, Unread):
            raw.note("", _line("", raw.lines), raw.value.message, raw.value.fix)
        else:
            try:
                document = parse_document(raw.value)
            except DocumentError as error:
                findings += [(_line(finding.path, raw.lines), finding) for finding in error.findings]
        if not findings:
            self.found.append((document, file, raw.lines))
            return
        self.problems += [Located(file, line, finding) for line, finding in findings]
        value = raw.value if isinstance(raw.value, dict) else {}
        if value.get("kind") == "Policy" or self.refused is None:
            return
        if not isinstance(value.get("name"), str):
            self.refused = None
        elif value.get("kind") == "CommandSet":
            self.broken.add(value["name"])
        else:
            self.refused.add(value["name"])


@dataclass(frozen=True, slots=True)
class Present:
    """What is applied already and may be used by the documents of files."""

    personas: frozenset[str] = frozenset()
    sets: Mapping[str, CommandSet] = field(default_factory=dict)


def load(paths: Iterable[Path], present: Present = Present()) -> Loaded:
    """Reads files, and what of folders counts (``folders``).  Raises nothing: what is wrong is in the answer."""
    names = find_files(paths)
    loader = _Loader()
    for file in names.files:
        loader.read(file)
    problems = [Located(path, None, Finding("", said)) for path, said in names.problems] + loader.problems
    refused = None if names.problems else loader.refused
    found = _expanded(loader.found, present, None if refused is None else loader.broken, problems)
    origins = {id(document): (where, lines) for document, where, lines in found}
    for document, finding in check_set((document for document, _, _ in found), present.personas):
        missing = document.persona if isinstance(document, Policy) and finding.path == "persona" else None
        if missing is not None and (refused is None or missing in refused):
            continue  # the problem is in its persona's document, which is named already
        where, lines = origins[id(document)]
        problems.append(Located(where, _line(finding.path, lines), finding))
    order = {str(file): index for index, file in enumerate(names.files, 1)}
    problems.sort(key=lambda problem: (order.get(problem.file, 0), problem.line or 0))
    if len(problems) > _PROBLEMS_MAX:
        more = Finding("", f"and {len(problems) - _PROBLEMS_MAX} more problems")
        problems[_PROBLEMS_MAX:] = [Located(problems[_PROBLEMS_MAX].file, None, more)]
    warnings = tuple(
        Warned(
            where,
            document.name,
            caution,
            tuple(_line(f"{caution.field}[{index}]", lines) for index, _ in caution.entries),
        )
        for document, where, lines in found
        if isinstance(document, Persona)
        for caution in _cautions(document)
    )
    skipped = tuple(Skipped(path, why) for path, why in sorted(names.skipped))
    documents = tuple(document for document, _, _ in found)
    begins = {
        key_of(document): origin(names.names.get(Path(where), Path(where).name), _line("", lines))
        for document, where, lines in found
    }
    return Loaded(documents, loader.count, tuple(problems), warnings, skipped, begins)


def _expanded(
    found: list[tuple[Document, str, Lines]], present: Present, broken: set[str] | None, problems: list[Located]
) -> list[tuple[Document, str, Lines]]:
    """The same with the commands of sets in the whitelists of personas; adds to ``problems``.

    ``broken`` are sets that were refused, whose own problems are enough; ``None``: not all of them are known.
    """
    sets = {**present.sets, **{item.name: item for item, _, _ in found if isinstance(item, CommandSet)}}
    expanded: list[tuple[Document, str, Lines]] = []
    for document, where, lines in found:
        item, findings = document, []
        if isinstance(document, Persona):
            try:
                unread = set(used(document)) - sets.keys() if broken is None else broken.intersection(used(document))
                item = expand(document, sets, unread)
                findings = [] if unread else pointless(item)
            except DocumentError as error:
                findings = list(error.findings)
        problems += [Located(where, _line(finding.path, lines), finding) for finding in findings]
        expanded.append((item, where, lines))
    return expanded


def _cautions(persona: Persona) -> list[Caution]:
    """Those of a persona, by the places at which its author wrote the entries or their sets."""
    expansion = persona.expansion
    if expansion is None or not expansion.origins:
        return cautions(persona)
    return [
        replace(caution, entries=tuple((expansion.place(index, text), text) for index, text in caution.entries))
        for caution in cautions(persona)
    ]


def _line(path: str, lines: Lines) -> int:
    while path and path not in lines:
        path = path.rpartition("[" if path.endswith("]") else ".")[0]
    return lines.get(path, lines.get("", 1))
