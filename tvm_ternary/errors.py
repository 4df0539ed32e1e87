"""The errors a user can meet: one base, a handful of kinds, one line each.

Every message says what it is about, what was found, what was expected and what to do, in that order and on one line.
The command line prints that line and exits non-zero; the trace shows only when ``TVM_TERNARY_TRACE=1`` is set.
"""

from __future__ import annotations


class TernaryError(Exception):
    """Base of every error that a user can cause or mend.

    Parameters
    ----------
    subject : str
        What the error is about: a file, a layer, an option.
    problem : str
        What was got and what was expected.
    hint : str, optional
        What to do about it.
    """

    def __init__(self, subject: str, problem: str, hint: str | None = None) -> None:
        self.subject = subject
        self.problem = problem
        self.hint = hint
        text = f"{subject}: {problem}" + (f"; {hint}" if hint else "")
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[type[TernaryError], tuple[str, str, str | None]]:
        return type(self), (self.subject, self.problem, self.hint)


class OptionError(TernaryError):
    """An option names something that does not exist: a scheme, target, layer, dimension or method."""


class ModelError(TernaryError):
    """The model file is missing, damaged, or holds values that cannot be quantized."""


class UnsupportedOperatorError(ModelError):
    """The graph holds an operator that the importer does not know."""


class LayoutError(TernaryError):
    """An array does not have the shape, dtype or content that its format demands."""


class ArtifactError(TernaryError):
    """A compiled ``.so`` is truncated, altered, of another version, or not one of ours."""


class HostError(TernaryError):
    """This machine lacks what the artifact or the compiler needs: CPU features, a linker, a runtime library."""


class InputError(TernaryError):
    """An input given to a module has the wrong name, dtype or shape."""


class OutputError(TernaryError):
    """A result could not be written: no such directory, no permission, no space."""
