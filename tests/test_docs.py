"""The documents: their links, the files that they name, their picture, and the numbers of the decision records."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
DECISIONS = sorted((ROOT / "docs" / "decisions").iterdir())
# a word in backquotes that begins like this is a path in this repository
TOPS = ("broker", "docs", "examples", "guest", "packaging", "persona", "scripts", "systemd", "tests", "vagrant")
_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2[^\n]*$", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"``.+?``|`[^`\n]+`")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_IMAGE = re.compile(r"<img\b[^>]*\bsrc=\"([^\"]*)\"")
_HEADING = re.compile(r"^#{1,6} +(.*?)(?: +#+)? *$", re.MULTILINE)
_PATH = re.compile(rf"`((?:{'|'.join(TOPS)})/[\w./-]*)`")
_PAGE_IN_CODE = re.compile(r"\bdocs/[\w/-]+\.(?:md|svg)\b")


def prose(page: Path) -> str:
    """A page's text without its fenced blocks."""
    return _FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What ``page.md#...`` may name: its headings, made into anchors as GitHub and GitLab do."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(page)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link in a heading counts by its text
        anchor = base = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        again = 0
        while anchor in found:
            again += 1
            anchor = f"{base}-{again}"
        found.add(anchor)
    return found


def dead_links(page: Path) -> Iterator[str]:
    """Each relative link of a page that leads to no file or to no heading."""
    text = _QUOTED.sub("", prose(page))
    for link in (*_LINK.findall(text), *_IMAGE.findall(text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield f"{link}: there is no {name}"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            yield f"{link}: there is no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert list(dead_links(page)) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# One `two`: three\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#one-two-three) [c](#here) [d](other.md#twice-1) [e](https://x.example/#y)\n"
        "`[f](quoted.md)`\n```\n[g](fenced.md)\n```\n"
        '[h](none.md) [i\nj](other.md#no-heading) [k](#there) [l](other.md#twice-2)\n<img alt="m" src="n.svg">\n'
    )
    assert [link.partition(":")[0] for link in dead_links(page)] == [
        "none.md", "other.md#no-heading", "#there", "other.md#twice-2", "n.svg",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "HACKING.md", "docs/glossary.md"])
def test_every_file_that_a_page_names_is_there(name: str) -> None:
    named = _PATH.findall(prose(ROOT / name))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_that_the_code_names_is_there() -> None:
    files = [
        file
        for top in ("broker", "examples", "guest", "packaging", "persona", "scripts", "systemd")
        for file in (ROOT / top).rglob("*")
        if file.is_file() and file.suffix in ("", ".c", ".h", ".py", ".sh", ".service", ".toml", ".yaml")
    ]
    named = {(page, file.name) for file in files for page in _PAGE_IN_CODE.findall(file.read_text(errors="replace"))}
    assert named
    assert {(page, name) for page, name in named if not (ROOT / page).exists()} == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_a_user_is_they(page: Path) -> None:
    assert re.findall(r".*\b(?:he|him|himself|his|she|her|herself)\b.*", prose(page), re.IGNORECASE) == []


def test_the_picture_says_what_its_source_says() -> None:
    """Rendering it needs graphviz, which no test does; that its words are those of the source needs none."""
    source = (ROOT / "docs" / "pieces.dot").read_text()
    labels = {line.strip() for label in re.findall(r'\blabel="([^"]*)"', source) for line in label.split(r"\n")}
    picture = {
        html.unescape(text).strip()
        for text in re.findall(r"<text [^>]*>([^<]*)</text>", (ROOT / "docs" / "pieces.svg").read_text())
    }
    assert labels - {""} == picture - {"user", "operator"}, "run 'make pictures'"


# --- decision records ---


def test_decisions_are_numbered_without_a_gap() -> None:
    names = [re.fullmatch(r"(\d{4})-[a-z0-9-]+\.md", file.name) for file in DECISIONS]
    assert [file.name for file, name in zip(DECISIONS, names, strict=True) if name is None] == []
    assert [int(name[1]) for name in names if name] == list(range(len(DECISIONS)))  # 0000 is the template


@pytest.mark.parametrize("file", DECISIONS, ids=lambda file: file.name)
def test_a_decision_has_one_title_and_a_text(file: Path) -> None:
    title, empty, text = file.read_text().split("\n", 2)
    assert re.fullmatch(r"# \S.*", title)
    assert empty == "" and text.strip()
    assert re.findall(r"^# .*", text, re.MULTILINE) == [], "a decision of its own, or a section (##)"
