"""Who may log in, and who is not asked about at all."""
