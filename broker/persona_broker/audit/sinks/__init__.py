"""Where records go besides the chain: the journal, a syslog server, a file."""
