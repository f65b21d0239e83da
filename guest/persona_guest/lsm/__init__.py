"""The kernel layer: BPF programs that stop what the agent has not approved, and Landlock where there is no BPF LSM."""
