"""What may differ between a run and its resumption: one comparison, key by key, for ``train`` and ``resume``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from luthier.config.hints import show, unknown_key
from luthier.config.keys import keys
from luthier.config.schema import RunConfig
from luthier.errors import RequestError

Kind = Literal["free", "continuing", "fixed"]

CHOSEN_AT_START = frozenset(
    {
        "data.too_long",
        "model.precision",
        "model.attention",
        "data.encoding",
        "adapter.alpha",
        "optim.lr",
        "train.epochs",
        "train.steps",
        "train.batch_tokens",
        "train.batch_samples",
        "train.max_length",
        "evaluate.every",
        "checkpoint.every",
    }
)
"""Keys whose null means "chosen when the run starts": left unset later, the choice of then stands."""

_ALTERNATIVES = (("train.epochs", "train.steps"), ("train.batch_tokens", "train.batch_samples"))
_FREE = ("log", "callbacks", "push", "evaluate", "checkpoint", "output")
_CONTINUING = ("train.epochs", "train.steps")
_MAPPINGS = ("data.columns",)


@dataclass(frozen=True)
class Change:
    """One key that differs: ``free`` has no effect on weights, ``continuing`` makes the run longer, ``fixed`` is another run."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {show(self.old)} → {show(self.new)}"


def compare(old: RunConfig, new: RunConfig) -> list[Change]:
    """List the keys whose values differ, in the schema's order; ``new`` is best run through ``merge_resolved`` first."""
    before, after = dict(_flat(old)), dict(_flat(new))
    names = list(before) + [name for name in after if name not in before]
    return [
        Change(name, before.get(name), after.get(name), kind(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def kind(key: str) -> Kind:
    """How a change of ``key`` is treated."""
    if key in _CONTINUING:
        return "continuing"
    return "free" if key.split(".")[0] in _FREE else "fixed"


def check(changes: list[Change], allow: Collection[str] = ()) -> list[str]:
    """Lines for the log about changes that may be.

    Args:
        changes: from ``compare``.
        allow: keys, or blocks of keys, whose change was permitted with ``--allow``.

    Raises RequestError naming every other fixed key with both values and how to permit it.
    """
    unknown = [name for name in allow if name not in keys() and not name.startswith("adapter.")]
    if unknown:
        raise RequestError(
            f"`{unknown[0]}` is not a key of the run file, so nothing can be allowed for it.",
            code="unknown-key",
            where="--allow",
            remedy=unknown_key(unknown[0].rpartition(".")[0], unknown[0].rpartition(".")[2], None, {}),
        )
    refused = [change for change in changes if change.kind == "fixed" and not is_allowed(change.key, allow)]
    if refused:
        flags = " ".join(f"--allow {change.key}" for change in refused)
        many = len(refused) > 1
        raise RequestError(
            f"{'These keys are' if many else 'This key is'} not what the run was started with: "
            + "; ".join(str(change) for change in refused)
            + ". The result would be neither the old run nor the new one.",
            code="config-changed",
            where=refused[0].key,
            remedy=f"Put the old value{'s' if many else ''} back, give another `output`, or permit it with {flags}.",
        )
    return [f"changed since: {change}{_NOTES[change.kind]}" for change in changes]


_NOTES: dict[Kind, str] = {
    "free": "",
    "continuing": " (the schedule goes on over the new length)",
    "fixed": " (permitted with --allow; resuming is not bit for bit)",
}


def merge_resolved(old: RunConfig, new: RunConfig) -> RunConfig:
    """Return ``new`` with the old run's choices where it leaves a key of ``CHOSEN_AT_START`` unset."""
    before = old.model_dump()
    after = new.model_dump()
    taken = {pair: [key for key in pair if _get(after, key) is not None] for pair in _ALTERNATIVES}
    for key in sorted(CHOSEN_AT_START):
        if any(key in pair and chosen for pair, chosen in taken.items()):
            continue
        section, name = key.split(".")
        chosen = (before.get(section) or {}).get(name)
        if after.get(section) and chosen is not None and after[section].get(name) is None:
            after[section][name] = chosen
    return RunConfig.model_validate(after)


def _get(values: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return (values.get(section) or {}).get(name)


def _flat(config: RunConfig) -> Iterator[tuple[str, Any]]:
    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and key not in _MAPPINGS and value:
                yield from walk(value, f"{key}.")
            else:
                yield key, value

    values = config.model_dump(mode="json")
    if config.adapter is not None:  # defaults too, which are not written for every method
        values["adapter"] = config.adapter.whole()
    for key, value in walk(values, ""):
        if key != "adapter" or value is not None:  # no adapter: its keys are absent, which is difference enough
            yield key, value


def is_allowed(key: str, allow: Collection[str]) -> bool:
    """Whether a change of ``key`` was permitted, by its own name or by that of its block."""
    return any(key == name or key.startswith(f"{name}.") for name in allow)
