"""What a persona needs on this machine: whether it is there, and who installs it."""
