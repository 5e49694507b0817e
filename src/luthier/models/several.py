"""Several adapters on one live model: combining them into a new one. Switching and disabling are peft's own calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from luthier.errors import RequestError
from luthier.models.adapter_names import check_name

METHODS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
_WITH_DENSITY = ("ties", "dare", "magnitude")


def combine_adapters(
    model: Any, weights: Mapping[str, float], *, name: str, method: str = "linear", density: float | None = None
) -> None:
    """Add an adapter made of others, each with its weight; the others stay as they are, and the active one stays active.

    Args:
        density: share of values kept, above 0 and at most 1; the ties, dare and magnitude_prune methods need it.

    Raises:
        RequestError: an adapter is not on the model, a name is taken or one that peft cannot hold, or the method does
            not fit these adapters.
    """
    known = getattr(model, "peft_config", None)
    if known is None or not hasattr(model, "add_weighted_adapter"):
        raise _wrong("the model holds no adapters that peft can combine.", "Open it with its adapters first.")
    if not weights:
        raise _wrong("no adapter was named.", "Give names with weights: {'a': 0.7, 'b': 0.3}.")
    strange = [each for each in weights if each not in known]
    if strange:
        raise _wrong(f"there is no adapter {strange[0]!r} on this model.", f"It has: {', '.join(known)}.")
    if name in known:
        raise _wrong(f"there is an adapter {name!r} already.", "Give another name, or delete_adapter it first.")
    check_name(name, "name")
    if method not in METHODS:
        raise _wrong(f"there is no method {method!r}.", f"Known: {', '.join(METHODS)}.")
    if method.startswith(_WITH_DENSITY) and (density is None or not 0 < density <= 1):
        raise _wrong(f"{method} needs density, above 0 and at most 1.", "Give, say, density=0.5.")
    with _as_before(model):
        _add(model, weights, name, method, density)


@contextmanager
def activated(model: Any, name: str) -> Iterator[None]:
    """One adapter alone is active inside; afterwards all is as it was, what trains included.

    Raises:
        RequestError: the model has no such adapter.
    """
    known = getattr(model, "peft_config", {})
    if name not in known:
        raise RequestError(
            f"there is no adapter {name!r} on this model.",
            code="no-such-adapter",
            where="adapter",
            remedy=f"It has: {', '.join(known) or 'none'}.",
        )
    with _as_before(model):
        model.set_adapter(name)
        yield


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    active, current = list(model.active_adapters), model.active_adapter
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        if model.peft_config[active[0]].is_prompt_learning:
            model.set_adapter(active[0])
        else:
            model.base_model.set_adapter(active)
        model.active_adapter = current
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)


def _add(model: Any, weights: Mapping[str, float], name: str, method: str, density: float | None) -> None:
    known = model.peft_config
    try:
        model.add_weighted_adapter(list(weights), [float(w) for w in weights.values()], name, method, density=density)
    except (ValueError, NotImplementedError, TypeError) as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        ranks = ", ".join(f"{each} r={getattr(known[each], 'r', '?')}" for each in weights)
        said = " ".join(str(error).split())[:300]
        raise _wrong(
            f"peft cannot combine these by {method} ({ranks}): {said}", "Different ranks: cat or svd."
        ) from error


def _wrong(message: str, remedy: str) -> RequestError:
    return RequestError(message, code="combine", where="luthier.combine", remedy=remedy)
