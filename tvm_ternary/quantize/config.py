"""What to make of a model's layers, as one value: from keyword arguments, the command line or a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Scheme
from tvm_ternary.quantize.plan import LayerPlan, make_plan, parse_layers, parse_place
from tvm_ternary.quantize.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EMBEDDINGS = ("int8", "float")


@dataclass(frozen=True)
class LayerQuantizationConfig:
    """Which layers become what.

    Parameters
    ----------
    scheme : str
        Of the matrices that ``layers`` chooses without a scheme of their own, ``t2a8g64`` for one.
    layers : sequence of str
        ``all``, ``attention``, ``ffn`` or regular expressions over matrix names, each perhaps with a scheme
        (``"query|key=t3a8g64"``); the first that matches decides, what none matches stays float.
    edges : str
        What the first and the last block become: ``t4`` (four planes, whose whole factors make a weight one of 81
        levels in 8 bits), ``float``, ``same`` or a scheme.
    output_layer : str
        The same for what stands behind the blocks: heads, poolers.
    embeddings : str
        ``int8``, a scale a row, or ``float``.
    recipe : Recipe
        How matrices are fitted.

    Raises
    ------
    OptionError
        If a value does not exist.
    """

    scheme: str = "t3a8g64"
    layers: tuple[str, ...] = ("all",)
    edges: str = "t4"
    output_layer: str = "float"
    embeddings: str = "int8"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        scheme = Scheme.parse(self.scheme)
        parse_layers(self.layers, scheme)
        parse_place("edges", self.edges, scheme)
        parse_place("output_layer", self.output_layer, scheme)
        require_embeddings(self.embeddings)

    @classmethod
    def of(cls, file: str | Path | None = None, **options: Any) -> LayerQuantizationConfig:
        """Read a TOML file, if there is one, and let options that are not None win over it.

        Parameters
        ----------
        file : path, optional
            Its keys are the parameters; ``layers`` is a string, an array, or a table of patterns to schemes in order.
        **options
            The parameters; ``recipe`` is a mapping of the parameters of `Recipe`, here and in the file.

        Raises
        ------
        OptionError
            If the file cannot be read, is no TOML, or has a key or a type that is not expected.
        """
        values = {} if file is None else _read_toml(Path(file))
        subject = "options" if file is None else str(file)
        recipe = {**_table(subject, values.get("recipe", {})), **(options.pop("recipe", None) or {})}
        values |= {name: value for name, value in options.items() if value is not None}
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                raise OptionError(subject, f"has no option {name!r}", f"options are: {', '.join(known)}")
        if "layers" in values:
            values["layers"] = _layers(subject, values["layers"])
        for name, value in values.items():
            if name not in ("layers", "recipe") and not isinstance(value, str):
                raise OptionError(subject, f"{name} is {value!r}; expected a string", f'for example {name} = "t2a8g64"')
        return replace(cls(), **{**values, "recipe": _recipe(subject, recipe)})

    def plan(self, matrices: Mapping[str, tuple[int, int]]) -> list[LayerPlan]:
        """Decide for each matrix, name to (N, K) in the order of their use.

        Raises
        ------
        OptionError
            If an entry of ``layers`` matches no matrix.
        """
        return make_plan(matrices, self.scheme, self.layers, edges=self.edges, output_layer=self.output_layer)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, the same for equal configurations."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**values, "layers": list(self.layers), "recipe": asdict(self.recipe)}


def require_embeddings(choice: str) -> None:
    """Check what embedding tables are to become.

    Raises
    ------
    OptionError
        If it is none of `EMBEDDINGS`.
    """
    if choice not in EMBEDDINGS:
        raise OptionError("embeddings", f"got {choice!r}; expected one of {', '.join(EMBEDDINGS)}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise OptionError(str(path), f"cannot be read ({error.strerror})", "check the path") from error
    except ValueError as error:
        raise OptionError(str(path), f"is no TOML: {error}", 'for example scheme = "t2a8g64"') from error


def _table(subject: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(subject, f"recipe is {value!r}; expected a table", 'for example [recipe] method = "twn"')
    return value


def _recipe(subject: str, values: Mapping[str, Any]) -> Recipe:
    """A recipe of options by name, each of the type that its default has."""
    defaults = asdict(Recipe())
    for name, value in values.items():
        if name not in defaults:
            raise OptionError(subject, f"recipe has no option {name!r}", f"options are: {', '.join(defaults)}")
        kinds = (int, float) if isinstance(defaults[name], float) else (type(defaults[name]),)
        if type(value) not in kinds:
            raise OptionError(subject, f"recipe {name} is {value!r}; expected one like {defaults[name]!r}")
    return Recipe(**values)


def _layers(subject: str, value: str | Sequence[str] | Mapping[str, str]) -> tuple[str, ...]:
    """One entry, several, or a table of them, as the entries of `plan.parse_layers`."""
    if isinstance(value, str):
        return (value,)
    entries = [f"{key}={own}" for key, own in value.items()] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence) or not all(isinstance(entry, str) for entry in entries):
        raise OptionError(subject, f"layers is {value!r}; expected strings", 'for example layers = ["ffn=t2a8g64"]')
    return tuple(entries)
