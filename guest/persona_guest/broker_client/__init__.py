"""The agent's link to the broker: questions, the event stream, records."""
