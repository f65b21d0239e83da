"""What was decided, on its way to the journal, to the broker, and to the user who asks why."""
