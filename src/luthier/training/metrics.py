"""Metrics on generated answers: one number a sample, averaged.

A name is `exact`, `json`, or a function of the user's as `module:function`, called with (answer, reference). Wrong
names are errors before training; a function that fails later counts as 0 for that sample, is counted under
`NAME/errors`, and is named in the log.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from luthier.errors import RequestError
from luthier.training import events

Metric = Callable[[str, str], float | bool]

KEY = "evaluate.metrics"
_log = logging.getLogger(__name__)


def exact(answer: str, reference: str) -> bool:
    """Whether both are the same text, apart from white space around them."""
    return answer.strip() == reference.strip()


def same_json(answer: str, reference: str) -> bool:
    """Whether the answer is the reference's JSON value and nothing else: no text or fence around it, no repeated key.

    The order of keys and white space don't count; `1` and `1.0` are the same number, `1` and `true` are not the same.

    Raises:
        ValueError: the reference itself is no JSON.
    """
    expected = _parse(reference)
    try:
        found = _parse(answer)
    except ValueError:
        return False
    return _same(found, expected)


BUILT_IN: dict[str, Metric] = {"exact": exact, "json": same_json}


def resolve(names: Sequence[str]) -> dict[str, Metric]:
    """The function behind each name; imports the user's modules.

    Raises:
        RequestError: naming `evaluate.metrics`, if there is no such metric, module or function.
    """
    return {name: _resolve_one(name) for name in names}


def score(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean of each metric over all samples, between 0 and 1 for the built-in ones; `NAME/errors` where a function failed.

    Raises:
        RequestError: as `resolve` does; never because of an answer or of what a metric does with it.
        ValueError: the numbers of answers and references differ, or there are none.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    results: dict[str, float] = {}
    for name, metric in resolve(names).items():
        total, errors = 0.0, 0
        for answer, reference in zip(answers, references, strict=True):
            try:
                total += _number(metric(answer, reference))
            except Exception as error:  # the user's code: whatever it does wrong, training goes on
                errors += 1
                if errors == 1:
                    _log.warning("%s: %s failed, counted as 0: %s: %s", KEY, name, type(error).__name__, error)
        results[name] = total / len(answers)
        if errors:
            results[f"{name}/errors"] = float(errors)
    return results


def _resolve_one(name: str) -> Metric:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        raise RequestError(
            f"there is no metric {name!r}.",
            code="unknown-metric",
            where=KEY,
            remedy=f"Known are {', '.join(BUILT_IN)}, and functions of yours as module:function.",
        )
    return events.resolve(name, key=KEY)


def _number(value: float | bool) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no finite number")
    return number


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values; Python's own takes True for 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(left, right) for left, right in zip(one, other, strict=True))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
