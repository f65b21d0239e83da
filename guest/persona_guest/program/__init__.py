"""What a process is about to run, or runs: which file, which interpreters, which arguments."""
