"""What answers while no agent runs."""
