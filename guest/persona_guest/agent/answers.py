"""How ``persona-agent`` answers people and programs: docs/cli.md has the form."""

import sys

from persona.answers import refusal


def refused(code: str, message: str, *, as_json: bool) -> int:
    """Says why there is no answer; the exit code."""
    if as_json:
        print(refusal(code, message))
    else:
        print(f"persona-agent: {message}", file=sys.stderr)
    return 1
