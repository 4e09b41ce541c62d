"""The optimizer and its posterior."""
