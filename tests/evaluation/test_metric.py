"""Metrics from files, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.evaluation.metric import Metric, compare, load_metric
from tvm_ternary.evaluation.models import Runner


def _load(tmp_path: Path, text: str, name: str = "f") -> Metric:
    (tmp_path / "metrics.py").write_text(text)
    return load_metric(f"{tmp_path / 'metrics.py'}:{name}")


def test_a_file_may_import_its_neighbour_and_define_a_dataclass(
    tmp_path: Path, run_of: Callable[[str], Runner]
) -> None:
    (tmp_path / "eval_test_neighbour.py").write_text("VALUE = 3")
    metric = _load(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport eval_test_neighbour\n"
        "@dataclass\nclass A:\n    x: int\n"
        "def f(run, twice=2):\n    return {'three': twice * A(eval_test_neighbour.VALUE).x // 2}\n",
    )
    assert not metric.wants_outputs
    assert metric.measure(run_of("mlp-float"), [], []) == {"three": 3.0}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("metrics.py", "expected FILE.py:FUNCTION"),
        ("metrics.txt:f", "expected FILE.py:FUNCTION"),
        ("nowhere.py:f", "nowhere.py: no such file"),
    ],
)
def test_a_wrong_name_is_refused(text: str, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        load_metric(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def f(run)", r"metrics.py cannot be run: SyntaxError"),
        ("\nraise KeyError('k')", r"KeyError: 'k' \(metrics.py, line 2\)"),
        ("def g(run): pass\ndef _h(): pass", "has no 'f'; expected one of g"),
        ("f = 3", "metric f: is a int; expected a function"),
        ("def f(): pass", "takes nothing; expected one or two"),
        ("def f(a, b, c): pass", "takes a, b, c; expected one or two"),
        ("def f(*, run): pass", "takes run; expected one or two"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        _load(tmp_path, text)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("'high'", "gives str for 'f'"),
        ("None", "gives NoneType"),
        ("{'a': [1]}", "gives list for 'a'"),
        ("np.array(['a'])", "gives an array"),
        ("run({'z': 1})", "input 'z'"),
        ("1 / 0", r"failed on mlp-float: ZeroDivisionError: division by zero \(metrics.py, line 3\)"),
    ],
)
def test_a_wrong_result_is_refused(tmp_path: Path, run_of: Callable[[str], Runner], result: str, problem: str) -> None:
    metric = _load(tmp_path, f"import numpy as np\ndef f(run):\n    return {result}\n")
    with pytest.raises((OptionError, InputError), match=problem):
        metric.measure(run_of("mlp-float"), [], [])


@pytest.mark.parametrize(
    ("other", "problem"),
    [({"b": 1.0}, "gives b for one model and a"), ({"a": 1.0}, "gives a number and"), ({"a": np.ones(2)}, r"\(2,\)")],
)
def test_models_must_be_measured_alike(other: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        compare("f", {"a": np.ones(3)}, other)
