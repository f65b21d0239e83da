"""This machine's health: measured, judged, reported."""
