"""Load, check, run and time a compiled artifact. Works without ``tvm`` and the rest of this package."""
