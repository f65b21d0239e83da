"""The audit's rules, pure: what is hashed, what a stream of numbers lacks, what a checkpoint says."""
