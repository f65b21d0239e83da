"""Evaluation: pure, no I/O; the state of the world is an argument."""
