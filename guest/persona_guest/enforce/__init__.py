"""What a persona binds, one file a facility; plans are made here as values, applied and undone."""
