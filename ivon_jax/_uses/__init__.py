"""What the posterior is used for: one module per use; nothing in `_core` imports them."""
