"""The guest's side: the agent that answers the gate, and the commands that its users run."""
