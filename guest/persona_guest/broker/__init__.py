"""The agent's side of the broker's HTTP interface: questions, the event stream, persona documents."""
