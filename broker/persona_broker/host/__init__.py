"""Where the host's load comes from."""
