"""The audit: a chain of records that shows whether one was changed, cut, reordered or lost."""
