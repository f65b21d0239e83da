"""The hosts of the VMs: where their load comes from, and ``persona-host``, which watches their hypervisors."""
