"""The model card: README.md of a final folder, in the form that model hubs read.

A card travels with the model, so it shows no samples of the data and no paths of the machine; the page shows both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from luthier.report import serving, text
from luthier.report.charts import smooth
from luthier.report.run_files import RunFiles, read_run_files

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48
SETTINGS = (
    ("method", "method"),
    ("model.precision", "precision"),
    ("adapter.type", "adapter"),
    ("adapter.r", "rank"),
    ("adapter.alpha", "alpha"),
    ("adapter.dropout", "adapter dropout"),
    ("adapter.target", "target layers"),
    ("optim.name", "optimiser"),
    ("optim.lr", "learning rate"),
    ("optim.schedule", "schedule"),
    ("optim.warmup", "warm-up"),
    ("optim.clip", "gradient clipping"),
    ("optim.weight_decay", "weight decay"),
    ("train.batch_tokens", "tokens per step"),
    ("train.batch_samples", "samples per step"),
    ("train.max_length", "longest row in tokens"),
    ("train.packing", "packing"),
    ("train.seed", "seed"),
)
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def model_card(run: Path, *, kind: Literal["adapter", "model"], open_with: str, final: Path | None = None) -> str:
    """Return the card as Markdown with a YAML head.

    Args:
        run: the run's folder; what is missing in it is left out of the card.
        kind: what the final folder holds.
        open_with: Python code that opens the final folder, shown as it is.
        final: where the final folder's files lie while it has not yet got its name; ``run/final`` if left out.

    Raises ArtifactError naming the file when one of the run's files cannot be parsed.
    """
    files = read_run_files(Path(run), final)
    summary = files.facts.get("summary")
    intro = (
        f"This {kind} was fine-tuned from {_code(_public(files.base)) if files.base else 'a base model'} with Luthier."
    )
    sections = [
        _head(files, kind),
        f"# {_line(files.name)}\n\n{intro}" + (f" {_line(summary)}." if summary else ""),
        f"## How to open it\n\n{_fence(open_with, 'python')}",
        _serving(Path(run) / "final" if final is None else final, files),
        _data(files),
        _results(files),
        _curve(files),
        _proof(files),
        _settings(files),
        _lineage(files),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _serving(folder: Path, files: RunFiles) -> str:
    """The commands of other tools; none where the folder isn't there."""
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        return ""
    lines = serving.commands(folder, shown="FOLDER", base=_public(files.base) if files.base else "BASE")
    return f"## How to serve it\n\n{_fence(chr(10).join(lines), 'sh')}"


def _head(files: RunFiles, kind: str) -> str:
    """Return the YAML that hubs index by; only names they can resolve are put there, never a path of this machine."""
    head: dict[str, Any] = {}
    if _is_hub_id(files.base):
        head["base_model"] = files.base
        head["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    head["library_name"] = "peft" if kind == "adapter" else "transformers"
    head["pipeline_tag"] = "text-generation"
    license_name = _mapping(files.facts.get("model")).get("license")
    if license_name:
        head["license"] = str(license_name)
    tags = ["luthier", files.setting("method"), files.setting("adapter.type") if kind == "adapter" else None]
    head["tags"] = [str(tag) for tag in tags if tag]
    datasets = [name for name in _sources(files.setting("data.train")) if _is_hub_id(name)]
    if datasets:
        head["datasets"] = datasets
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _data(files: RunFiles) -> str:
    names = [name if _is_hub_id(name) else Path(name).name for name in _sources(files.setting("data.train"))]
    rows = [("trained on", ", ".join(names))] if names else []
    told = {
        key: value for key, value in _mapping(files.facts.get("data")).items() if key != "sources"
    }  # they name places
    rows += [(text.words(str(key)), _cell(value)) for key, value in told.items()]
    return f"## Data\n\n{_table(('', ''), rows)}" if rows else ""


def _results(files: RunFiles) -> str:
    """Return the last held-out figures beside the base model's."""
    if not files.evaluations:
        return ""
    base, last, best = files.base_evaluation or {}, files.evaluations[-1], files.best_evaluation
    keys = [key for key in ("eval_loss", "perplexity") if last.get(key) is not None]
    keys += [key for key in last if key.startswith("metric/")]
    names = {"eval_loss": "held-out loss (nats per token)"}
    rows = [
        (names.get(key, key.removeprefix("metric/")), text.score(base.get(key)), text.score(last[key])) for key in keys
    ]
    note = f"\n\nBest held-out loss: {text.loss(best['eval_loss'])} at step {best['step']:,}." if best else ""
    step = f"step {last['step']:,}"
    return f"## Results\n\n{_table(('', 'base model', step), rows)}{note}"


def _curve(files: RunFiles) -> str:
    curve = smooth([(record["step"], record.get("loss")) for record in files.steps])
    if len(curve) < 2:
        return ""
    last = len(curve) - 1
    shown = [curve[round(index * last / (SPARK_WIDTH - 1))][1] for index in range(SPARK_WIDTH)]
    low, high = min(shown), max(shown)
    sparks = "".join(SPARKS[round((value - low) / ((high - low) or 1) * (len(SPARKS) - 1))] for value in shown)
    points = [curve[index] for index in sorted({round(index * last / 5) for index in range(6)})]
    table = _table(
        ("step", *(f"{step:,.0f}" for step, _ in points)), [("loss", *(text.loss(value) for _, value in points))]
    )
    tokens = sum(record.get("tokens") or 0 for record in files.steps)
    line = f"{files.last_step:,} steps, {text.short(tokens)} tokens, {text.seconds(files.seconds)}."
    return f"## Training\n\n{_fence(sparks)}\n\n{table}\n\n{line}"


def _proof(files: RunFiles) -> str:
    if not files.proof:
        return ""
    verdict = files.proof.get("verdict") or ("passed" if files.proof.get("passed") else "failed")
    says = f" {_line(files.proof['says'])}" if files.proof.get("says") else ""
    rows = [
        (text.words(key), _cell(files.proof[key]))
        for key in ("max_difference", "bound", "compared")
        if key in files.proof
    ]
    return f"## Proof\n\n**{_line(verdict)}.**{says}" + (f"\n\n{_table(('', ''), rows)}" if rows else "")


def _settings(files: RunFiles) -> str:
    rows = [(name, _cell(value)) for key, name in SETTINGS if (value := files.setting(key)) is not None]
    rows += [("device", _cell(files.facts["device"]))] if files.facts.get("device") else []
    rows += [(str(name), _cell(version)) for name, version in _mapping(files.facts.get("versions")).items()]
    return f"## Settings\n\n{_table(('', ''), rows)}" if rows else ""


def _lineage(files: RunFiles) -> str:
    parents = [(parent.get("kind"), _public(parent.get("name")), parent.get("fingerprint")) for parent in files.parents]
    if not parents and files.base:
        parents = [("base", _public(files.base), None)]
    rows = [(_cell(kind), _cell(name), _code(str(mark)) if mark else "–") for kind, name, mark in parents]
    return f"## Lineage\n\n{_table(('made from', 'name', 'fingerprint'), rows)}" if rows else ""


def _sources(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(one.get("path") if isinstance(one, Mapping) else one) for one in values if one]


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith((".gguf", ".jsonl", ".json", ".csv", ".parquet", ".txt"))


def _public(name: Any) -> str:
    """Return a name that may travel with the model: of a path, its last part."""
    name = str(name or "")
    return name if _is_hub_id(name) else Path(name).name


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_line(text.words(str(key)))} {_cell(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _line(text.number(value))


def _line(value: Any) -> str:
    """Return text that stays one line of Markdown, a cell of a table, and no markup."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;")


def _code(value: str) -> str:
    return f"`{' '.join(value.replace('`', '').replace('|', '').split())}`"


def _fence(content: str, language: str = "") -> str:
    """Return a code block whose fence is longer than any run of backticks within."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"
