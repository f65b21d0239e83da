"""The agent's two sockets: one for the PAM module, one for users."""
