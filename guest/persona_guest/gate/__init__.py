"""The part of the exec gate that asks: receives each execve of a session, identifies, decides, answers."""
