"""What the posterior is used for."""
