"""Debian's own parts: systemd, the user database, home and runtime directories."""
