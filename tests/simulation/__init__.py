"""A fleet of hosts in simulated time, under the real arbiter and under other rules."""
