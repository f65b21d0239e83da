"""What happens to running processes when another persona applies."""
