"""The database: documents and their versions, guests, sessions, decisions."""
