"""Reads personas and policies from files, and says where in a file what is wrong."""
