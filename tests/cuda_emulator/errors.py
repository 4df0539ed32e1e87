"""What the emulator raises."""


class EmulatorError(Exception):
    """A kernel did what it must not do, or can't be compiled; the text says which thread did what, and where."""
