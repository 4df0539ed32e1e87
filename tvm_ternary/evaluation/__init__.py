"""Float against ternary: both compiled, both run on the same data, and what differs."""
