"""What ``luthier inspect`` prints for people."""

from __future__ import annotations

from typing import Any

from luthier.artifacts.identify import Artifact
from luthier.artifacts.lineage import Ancestor


def show(artifact: Artifact) -> str:
    """A few lines about an artefact: what it is, what it comes from, what opens it, what is wrong and the mend."""
    facts = artifact.facts
    lines = [f"{artifact.path}", f"  kind        {artifact.kind}", f"  whole       {'yes' if artifact.whole else 'NO'}"]
    lines += _row("base", _name(artifact.base))
    lines += _row("adapter", _adapter(artifact.adapter))
    lines += _row("precision", artifact.precision)
    lines += _row("parameters", f"{artifact.parameters:,}" if artifact.parameters else None)
    lines += _row("class", facts.get("architecture"))
    lines += _row("step", facts.get("step"))
    for entry in facts.get("checkpoints", []):
        lines += _row(
            "checkpoint", f"step {entry['step']}{'' if entry.get('whole', True) else ' (DAMAGED)'}  {entry['path']}"
        )
    if artifact.kind == "run":
        lines += _row("final", facts["final"] or "not yet")
    proof = facts.get("proof")
    lines += _row("proof", f"{proof.get('verdict')}: {proof.get('says')}" if proof else None)
    lines += _lineage(artifact)
    lines += _row("opens with", artifact.opens_with)
    for problem in artifact.problems:
        lines += [f"  problem     {problem.message} [{problem.code}]", f"              {problem.remedy}"]
    return _plain("\n".join(lines))


def _row(name: str, value: Any) -> list[str]:
    return [] if value in (None, "") else [f"  {name:<11} {value}"]


def _name(base: dict[str, Any] | None) -> str:
    if not base:
        return ""
    mark = base.get("fingerprint")
    return f"{base.get('name')}" + (f"  ({mark[:16]})" if mark else "")


def _adapter(adapter: dict[str, Any] | None) -> str:
    if not adapter:
        return ""
    rank = f" r{adapter['r']}" if adapter.get("r") else ""
    targets = adapter.get("target_modules")
    listed = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else targets
    return f"{adapter['type']}{rank}" + (f" on {listed}" if listed else "")


def _lineage(artifact: Artifact) -> list[str]:
    """What this was made from, drawn as a tree whose root is this."""
    tree = artifact.lineage()
    if not tree:
        return []
    own = artifact.facts.get("fingerprint") or ""
    lines = _row("lineage", f"this {artifact.kind}{f' ({own[:16]})' if own else ''}")
    return lines + [f"  {'':<11} {line}" for line in _branches(tree)]


def _branches(ancestors: list[Ancestor]) -> list[str]:
    lines = []
    for ancestor in ancestors:
        last = ancestor is ancestors[-1]
        mark = f" ({ancestor.fingerprint[:16]})" if ancestor.fingerprint else ""
        note = f": {ancestor.note}" if ancestor.note else ""
        lines.append(f"{'└─' if last else '├─'} {ancestor.kind}: {ancestor.name}{mark}{note}")
        lines += [f"{'   ' if last else '│  '}{line}" for line in _branches(ancestor.parents)]
    return lines


def _plain(text: str) -> str:
    """Without what a terminal would obey or cannot print: names come from files that others wrote."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
