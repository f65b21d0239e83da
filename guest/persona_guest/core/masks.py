"""Hides what is secret in command lines before they are recorded: values of options, passwords in URLs, tokens.

A list of forms, and no more than that: what a program reads from a file, from its standard input or as an argument
without a name of its own is not recognised.  Rather too much is hidden than too little, except for the commands in a
shell's command line, which stay readable.  Everything here is pure, and takes time in proportion to the text.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from persona_guest.core.mask_rules import EXPECTED, SHIPPED, MaskError, Rule, rule_of

HIDDEN = "***"
READ_MAX = 512  # characters of an argument that are searched for secrets; fewer are recorded
_DEPTH = 2  # command lines in arguments of command lines
_WORDS = 128  # in all of these; what is left of a longer one is hidden as a whole

Hide = Callable[[str], str]


_LONG = (
    "password|passwd|passwort|passphrase|passcode|secret|token|api[_-]?key|access[_-]?key|secret[_-]?key|auth[_-]?key"
    "|credentials?|storepass|keypass|sshpass|bearer"
)
_SHORT = "pass|pwd|pw|psk|cookie|redis(?:cli)?_auth"
_SECRET = re.compile(rf"(?:{_LONG}|(?:^|[_.-])(?:{_SHORT}))$", re.IGNORECASE)
_NEVER = frozenset({"pwd", "oldpwd"})  # of the environment: directories
_HINTS = (
    *("pass", "pw", "secret", "token", "key", "cred", "psk", "cookie", "auth", "bearer", "://"),
    *("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "hvs.", "sk-", "eyj", "aiza"),
)

_NAME = r"[A-Za-z0-9_.-]+"
_NAMED = re.compile(rf"(-{{0,2}})({_NAME})=(.+)", re.DOTALL)
_HEADER = re.compile(r"((?:-H|[A-Za-z.-]*[hH]eader=)?)\s*([A-Za-z][A-Za-z0-9-]*)(\s*:\s*)(\S+)(.*)", re.DOTALL)
_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie"})
_PAIR = re.compile(rf"""(?<![A-Za-z0-9_.-])({_NAME})=(?=("[^"]*"?|'[^']*'?|[^&;,\s"']+))""")
_JSON = re.compile(r'("([^"\\]{1,64})"\s*:\s*)"((?:[^"\\]|\\.)*)("|$)', re.DOTALL)
_PORT = re.compile(r"[0-9]+(?:[/?#]|$)")
_TOKEN_AS_USER = 20  # characters; nobody's name is that long
_PASS = re.compile(r"pass:.+", re.DOTALL)  # openssl's own form
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}"
    r"|hvs\.[\w-]{20,}|sk-[\w-]{20,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)?)"
)
_WORD = re.compile(r"""(?:"[^"]*"?|'[^']*'?|\\.|[^\s"'\\]|\\$)+""", re.DOTALL)
_SHELLS_C = re.compile(r"-[A-Za-z]*c")
_LETTERS = re.compile(r"-[A-Za-z]+")
_CONNECT = re.compile(r"([^/@\s-][^/@\s]*/)([^@\s]+)(@.*)?", re.DOTALL)
_CONNECT_RULE = "USER/PASSWORD"
_STARTERS = frozenset({"sshpass"})  # what follows their secret is another program's


class Masks:
    """The shipped list and an operator's own rules."""

    def __init__(self, own: Iterable[str] = ()) -> None:
        """``own``: ``--option``, ``NAME`` (of a variable, field or header) or ``PROGRAM -x``.  Raises ``MaskError``."""
        self._programs: dict[str, dict[str, list[Rule]]] = {}  # rules by program, and by their first two characters
        self._names: set[str] = set()
        self._connects: set[str] = set()
        for line in filter(None, SHIPPED.splitlines()):
            programs, _, options = line.partition(": ")
            for program in programs.split():
                for option in options.split():
                    self._add(program, option)
        for text in own:
            words = text.split(" ")
            if len(words) == 2 and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}", words[0]):
                self._add(words[0], words[1])
            elif len(words) == 1 and re.fullmatch(rf"-{{0,2}}{_NAME}", text) and len(text) <= 64:
                self._names.add(text.lstrip("-").lower())
            else:
                raise MaskError(f"{text!r}: {EXPECTED}")
        self._hints = (*_HINTS, *self._names)

    def _add(self, program: str, option: str) -> None:
        if option == _CONNECT_RULE:
            self._connects.add(program)
        else:
            rule = rule_of(option)
            head = (rule.separate or rule.attached)[:2]
            self._programs.setdefault(program, {}).setdefault(head, []).append(rule)

    def argv(self, program: str, argv: Sequence[str], limit: int) -> tuple[str, ...]:
        """``argv`` of ``program`` (a path, or empty) with what is secret in it hidden, each cut at ``limit``."""
        words = [argument[:READ_MAX] for argument in argv]
        if self._may_have(program, words):
            words = self._words(words, program, _Budget())
        return tuple(word[:limit] for word in words)

    def _may_have(self, program: str, words: Sequence[str]) -> bool:
        """Whether it is worth a closer look, which nearly none is."""
        text = "\n".join(words)
        lowered = text.lower()
        if any(hint in lowered for hint in self._hints):
            return True
        return any(self._is_known(_base(word)) for word in (program, *text.replace('"', " ").replace("'", " ").split()))

    def _is_known(self, base: str) -> bool:
        return base in self._programs or base in self._connects

    # --- words ------------------------------------------------------------------------------------

    def _words(self, words: Sequence[str], program: str, budget: "_Budget") -> list[str]:
        """One command line, word by word."""
        active = _Active()
        starter = self._begin(_base(program), active)
        hide: Hide | None = None  # of the word that comes
        last = ""
        out: list[str] = []
        for word in words:
            if hide is not None and not (word.startswith("-") and hide is _hidden_value):
                out.append(hide(word))
                hide, last = None, ""
                continue
            starter = self._begin(_base(word), active) or starter
            hide, shown = active.apply(word)
            if starter and (hide is not None or shown is not None):
                active, starter = _Active(), False
            if hide is None and shown is None and word.startswith("-") and self._is_secret(word.lstrip("-")):
                hide = _hidden_value
            if shown is None and active.connects and (found := _CONNECT.fullmatch(word)):
                shown = found[1] + HIDDEN + (found[3] or "")
            out.append(self._argument(word, last, budget) if shown is None else shown)
            last = word
        return out

    def _begin(self, program: str, active: "_Active") -> bool:
        """From this word on a program's rules hold too; whether it starts another program once it has its secret."""
        if program not in active.programs and self._is_known(program):
            active.programs.add(program)
            active.connects = active.connects or program in self._connects
            for head, rules in self._programs.get(program, {}).items():
                active.rules.setdefault(head, []).extend(rules)
        return program in _STARTERS

    # --- one word ---------------------------------------------------------------------------------

    def _argument(self, text: str, last: str, budget: "_Budget") -> str:
        has_space = any(map(str.isspace, text))
        is_line = has_space and bool(_SHELLS_C.fullmatch(last))
        header = _HEADER.fullmatch(text)
        if header and (
            header[2].lower() in _HEADERS or (not is_line and header[3][-1:].isspace() and self._is_secret(header[2]))
        ):
            scheme = f"{header[4]} " if header[5].strip() and "authorization" in header[2].lower() else ""
            return f"{header[1]}{header[2]}{header[3]}{scheme}{HIDDEN}"
        if not is_line:
            named = _NAMED.fullmatch(text)
            if named and self._is_secret(named[2]):
                return f"{named[1]}{named[2]}={HIDDEN}"
            if _PASS.fullmatch(text):
                return f"pass:{HIDDEN}"
        if has_space and budget.depth < _DEPTH:
            text = self._line(text, budget)
        return self._anywhere(text)

    def _line(self, text: str, budget: "_Budget") -> str:
        """A command line within one argument, as a shell would read its words."""
        found = list(itertools.islice(_WORD.finditer(text), budget.words + 1))
        if len(found) > budget.words:
            text = text[: found.pop().start()] + HIDDEN
        budget.words -= len(found)
        budget.depth += 1
        inner = [_unquoted(match[0]) for match in found]
        hidden = self._words([word for _, word, _ in inner], "", budget)
        budget.depth -= 1
        out, at = [], 0
        for match, (before, _, after), word in zip(found, inner, hidden, strict=True):
            out += [text[at : match.start()], before, word, after]
            at = match.end()
        return "".join(out) + text[at:]

    def _anywhere(self, text: str) -> str:
        """What is recognised wherever it is."""
        if "=" in text:
            text = self._pairs(text)
        if '"' in text:
            text = _JSON.sub(lambda m: f'{m[1]}"{HIDDEN}{m[4]}' if self._is_secret(m[2]) else m[0], text)
        if "://" in text:
            text = re.sub(r"\S+", lambda m: _without_userinfo(m[0]), text)
        return _SHAPES.sub(HIDDEN, text)

    def _pairs(self, text: str) -> str:
        """``NAME=VALUE`` wherever it begins, also as the value of another name (``--set=password=x``)."""
        out, at = [], 0
        for match in _PAIR.finditer(text):
            if match.start() >= at and self._is_secret(match[1]):
                out += [text[at : match.end()], HIDDEN]
                at = match.end(2)
        return "".join(out) + text[at:]

    def _is_secret(self, name: str) -> bool:
        lowered = name.lower()
        if lowered in self._names:
            return True
        return bool(_SECRET.search(name)) and lowered not in _NEVER and not lowered.startswith(("no-", "no_"))


class _Budget:
    """How much of one argv is still looked at as command lines, and how deep in such a line the look is."""

    def __init__(self) -> None:
        self.words = _WORDS
        self.depth = 0


class _Active:
    """The rules that hold for the words that come."""

    def __init__(self) -> None:
        self.programs: set[str] = set()
        self.rules: dict[str, list[Rule]] = {}
        self.connects = False
        self._before: set[str] = set()

    def apply(self, word: str) -> tuple[Hide | None, str | None]:
        """How the next word is hidden, or this word with its own value hidden; neither where no rule says so."""
        found = self._find(word)
        self._before.add(word)
        if found is None:
            return None, None
        rule, value = found
        if value:
            return None, rule.attached + _value(value, rule.keep)
        return (lambda text: _value(text, rule.keep)), None

    def _find(self, word: str) -> tuple[Rule, str] | None:
        """A rule, and the value that is in the word itself; empty = the next word is the value."""
        for rule in self.rules.get(word[:2], ()):
            if rule.after and rule.after not in self._before:
                continue
            if word == rule.separate:
                return rule, ""
            if rule.attached and word.startswith(rule.attached) and len(word) > len(rule.attached):
                return rule, word[len(rule.attached) :]
        if len(word) > 2 and _LETTERS.fullmatch(word):  # several options of one letter: the last may have a value
            for rule in self.rules.get("-" + word[-1], ()):
                if rule.separate == "-" + word[-1] and (not rule.after or rule.after in self._before):
                    return rule, ""
        return None


def _hidden_value(_word: str) -> str:
    return HIDDEN


def _value(text: str, keep: str) -> str:
    """A value without what is secret in it: all of it, or what comes after the first ``keep``."""
    if not keep:
        return HIDDEN
    head, found, _ = text.partition(keep)
    return head + found + HIDDEN if found else text


def _base(word: str) -> str:
    return word.rpartition("/")[2]


def _unquoted(word: str) -> tuple[str, str, str]:
    """The quote that a whole word begins with, what is in it, and the quote that ends it, if one does."""
    quote = word[0]
    if quote not in "\"'":
        return "", word, ""
    inner = word[1:].removesuffix(quote)
    return ("", word, "") if quote in inner else (quote, inner, word[1 + len(inner) :])


def _without_userinfo(word: str) -> str:
    """A word with the password of a URL in it hidden, or the user where that is a token."""
    at = word.rfind("@")
    if at < 0:
        at = len(word) if len(word) >= READ_MAX - 64 else -1  # cut off before its '@'
    begin = word.find("://")
    while 0 <= begin < at:
        user, colon, password = word[begin + 3 : at].partition(":")
        if "/" not in user:
            if colon and password and not _PORT.match(password):
                return f"{word[: begin + 3]}{user}:{HIDDEN}{word[at:]}"
            if not colon and len(user) >= _TOKEN_AS_USER:
                return f"{word[: begin + 3]}{HIDDEN}{word[at:]}"
        begin = word.find("://", begin + 3)
    return word
