"""What each VM is to have of its host: what the arbiter is told, and what it says."""
