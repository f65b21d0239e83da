"""The agent: what makes it, answers for it, and shows it."""
