"""One login, from its first packet to its last process."""
