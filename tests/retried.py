"""Tests that may be tried a second time in a run, each with the reason that was found; nothing else is.

An entry is a debt: it names what goes wrong in the test or in the emulation, and goes when that is mended.
Three second tries in one run are the most; with more, the run fails (``tests/report.py``).
"""

RETRIED: dict[str, str] = {}
