"""The record: documents and their versions, guests, sessions, decisions."""
