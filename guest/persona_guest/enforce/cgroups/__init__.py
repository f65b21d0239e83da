"""Limits: cgroups v2."""
