"""Installs and starts what personas need: a process of its own, with the rights for it that the agent lacks."""
