"""Thin wrappers of kernel facilities, named as their man pages name them."""
