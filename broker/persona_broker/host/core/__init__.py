"""Pure: raw readings into percentages, and the sample of a host as it crosses to the broker."""
