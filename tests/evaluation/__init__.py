"""Float against ternary."""
