"""Which version this is: of the packages, and what ``--version`` says.  setup.cfg reads it."""

VERSION = "0.2.0"
