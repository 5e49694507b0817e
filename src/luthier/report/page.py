"""``report.html``: a run on one page, in one file, at any stage of the run; needs no network to be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from luthier.report import text
from luthier.report.charts import Chart, Point, Series, draw, smooth
from luthier.report.run_files import Record, RunFiles, read_run_files


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path; an earlier one is replaced in one go.

    Raises ArtifactError naming the file when one of the run's own files cannot be parsed.
    """
    page = render(read_run_files(Path(run_folder)))
    target = Path(run_folder) / "report.html"
    beside = target.with_name(f".report.html.{os.getpid()}")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, target)
    return target


def render(files: RunFiles) -> str:
    """Return the page as HTML; every text of the run is escaped."""
    package = resources.files("luthier.report")
    style = package.joinpath("page.css").read_text(encoding="utf-8")
    script = package.joinpath("page.js").read_text(encoding="utf-8")
    sections = [
        _header(files),
        _tiles(files),
        _section("Curves", f'<div class="charts">{"".join(draw(chart) for chart in charts(files))}</div>'),
        _section("Scores on held-out samples", _scores(files)),
        _section("Before and after", _samples(files)),
        _section("Proof", _proof(files)),
        _section("Lineage", _lineage(files)),
        _section("Facts", _facts(files)),
        _section("Checkpoints", _checkpoints(files)),
        _section("Skipped steps and notes", _notes(files)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(files.name)} · Luthier</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer>Made by Luthier from metrics.jsonl, run.yaml and the final folder. This file needs no network."
        + f"</footer>\n</main>\n<script>\n{script}</script></body></html>\n"
    )


def charts(files: RunFiles) -> list[Chart]:
    """Return the run's curves; those of which nothing was measured are left out, save the loss."""
    loss = _points(files.steps, "loss")
    skipped = [record["step"] for record in files.steps if record.get("skipped")]
    evaluation = _points(([files.base_evaluation] if files.base_evaluation else []) + files.evaluations, "eval_loss")
    best = files.best_evaluation
    ringed = (best["step"], best["eval_loss"]) if best and len(files.evaluations) > 1 else None
    span = (0, files.last_step) if files.last_step else None  # one axis for all, so that they can be read together
    unit = "nats per trained token"
    lines = (
        [Series("each step", loss, "raw"), Series("smoothed", smooth(loss))]
        if len(loss) > 20
        else [Series("training", loss)]
    )
    drawn = [
        Chart(
            "Loss",
            unit,
            [*lines, Series("held out", evaluation, "dots", "second")],
            290,
            flaws=skipped,
            best=ringed,
            span=span,
        )
    ]
    evaluation = _points(files.evaluations, "eval_loss")
    if len(evaluation) > 1:  # by itself, without the base model's, it shows whether it still falls
        drawn.append(
            Chart("Held-out loss", unit, [Series("held out", evaluation, "dots", "second")], best=ringed, span=span)
        )
    small = [
        ("Learning rate", "", "lr", True),
        ("Gradient norm", "unclipped", "grad_norm", True),
        ("Speed", "tokens per second", "tokens_per_second", True),
    ]
    for title, unit, key, from_zero in small:
        points = _points(files.steps, key)
        if any(value is not None for _, value in points):
            noisy = key != "lr" and len(points) > 20
            series = (
                [Series("each step", points, "raw"), Series("smoothed", smooth(points))]
                if noisy
                else [Series(title, points)]
            )
            drawn.append(Chart(title, unit, series, from_zero=from_zero, span=span))
    return drawn


def _points(records: Iterable[Record], key: str) -> list[Point]:
    return [(record["step"], record.get(key)) for record in records if key in record]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _status(files: RunFiles) -> tuple[str, str]:
    """Return a mood for colour, and words."""
    if files.proof:
        verdict = str(files.proof.get("verdict") or ("passed" if files.proof.get("passed") else "failed"))
        mood = "good" if files.proof.get("passed") else "unsure" if verdict == "inconclusive" else "bad"
        return mood, f"Proof {verdict}"
    if files.finished:
        return "", "Finished, not proven"
    return "", f"Step {files.last_step:,}{f' of {files.total_steps:,}' if files.total_steps else ''}"


def _header(files: RunFiles) -> str:
    mood, status = _status(files)
    summary = files.facts.get("summary")
    return (
        f'<header><p class="kicker">{escape(files.base)}</p>'
        f'<div class="title"><h1>{escape(files.name)}</h1><span class="pill {mood}">{escape(status)}</span></div>'
        + (f'<p class="summary">{escape(str(summary))}</p>' if summary else "")
        + "</header>"
    )


def _tiles(files: RunFiles) -> str:
    """Return the few figures that one looks for first, each with a line that puts it into proportion."""
    tiles = []
    losses = [record["loss"] for record in files.steps if record.get("loss") is not None]
    if losses:
        curve = smooth(list(enumerate(losses)))
        tiles.append(("Loss", text.loss(curve[-1][1]), f"from {text.loss(curve[0][1])}"))
    if best := files.best_evaluation:
        before = (files.base_evaluation or {}).get("eval_loss")
        beside = "best" if before is None else f"base {text.loss(before)}"
        tiles.append(("Held-out loss", text.loss(best["eval_loss"]), f"{beside}, step {best['step']:,}"))
    total = f"of {files.total_steps:,}" if files.total_steps else ""
    epochs = max((record.get("epoch") or 0 for record in files.steps), default=0)
    seen = f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}" if epochs else ""
    tiles.append(("Steps", f"{files.last_step:,}", " · ".join(part for part in (total, seen) if part)))
    if files.seconds:
        tiles.append(("Duration", text.seconds(files.seconds), "evaluation included"))
    if tokens := sum(record.get("tokens") or 0 for record in files.steps):
        trained = sum(record.get("trained_tokens") or 0 for record in files.steps)
        tiles.append(("Tokens", text.short(tokens), f"{trained / tokens:.0%} of them trained" if trained else ""))
    if memory := max((record.get("memory_gib") or 0 for record in files.steps), default=0):
        tiles.append(("Memory", f"{memory:.1f} GiB", "at the highest"))
    cells = "".join(
        f"<li><span>{name}</span><strong>{escape(figure)}</strong><small>{escape(note)}</small></li>"
        for name, figure, note in tiles
    )
    return f'<ul class="tiles">{cells}</ul>'


def _scores(files: RunFiles) -> str:
    """Return metrics on generated answers, the base model beside the tuned one."""
    last = next((record for record in reversed(files.evaluations) if _metrics(record)), None)
    if last is None:
        return ""
    before = _metrics(files.base_evaluation or {})
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{text.score(before.get(name))}</td><td class="n"><b>{text.score(value)}</b></td></tr>'
        for name, value in _metrics(last).items()
    )
    head = f'<tr><th>Metric</th><th class="n">Base model</th><th class="n">Step {last["step"]:,}</th></tr>'
    return f'<div class="panel scroll"><table>{head}{rows}</table></div>'


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("metric/"): value for key, value in record.items() if key.startswith("metric/")}


def _samples(files: RunFiles) -> str:
    last = next((record for record in reversed(files.evaluations) if record.get("samples")), None)
    before = (files.base_evaluation or {}).get("samples") or []
    after = last["samples"] if last else []
    known = {str(sample.get("prompt")): sample for sample in before}
    shown = after or before
    panels = []
    for sample in shown:
        base = known.get(str(sample.get("prompt")), {}).get("answer")
        tuned = sample.get("answer") if after else None
        reference = sample.get("reference")
        answers = [
            ("", "Reference", reference, ""),
            ("", "Base model", base, _match(base, reference)),
            ("after", f"Step {last['step']:,}" if last else "", tuned, _match(tuned, reference)),
        ]
        boxes = "".join(
            f'<div class="{kind}"><h4>{escape(title)}{match}</h4><pre>{escape(str(answer))}</pre></div>'
            for kind, title, answer, match in answers
            if answer is not None
        )
        panels.append(
            f'<article class="panel sample"><div class="prompt">{_prompt(sample.get("prompt"))}</div><div class="answers">{boxes}</div></article>'
        )
    return "".join(panels)


def _match(answer: str | None, reference: str | None) -> str:
    same = answer is not None and reference is not None and str(answer).strip() == str(reference).strip()
    return " · <em>same as the reference</em>" if same else ""


def _prompt(prompt: Any) -> str:
    """Return a prompt as text, or turn by turn where it is a list of messages."""
    if not isinstance(prompt, list):
        return escape(str(prompt or ""))
    return "".join(
        f'<div class="turn"><span class="role">{escape(str(turn.get("role", "")))}</span>{escape(_content(turn.get("content")))}</div>'
        for turn in prompt
        if isinstance(turn, Mapping)
    )


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", part)) if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)


def _proof(files: RunFiles) -> str:
    if not files.proof:
        return ""
    mood, status = _status(files)
    says = files.proof.get("says")
    rest = {key: value for key, value in files.proof.items() if key not in ("says", "passed", "verdict", "format")}
    return (
        f'<div class="panel proof"><span class="pill {mood}">{escape(status)}</span>'
        + (f"<p>{escape(str(says))}</p>" if says else "<p></p>")
        + f"{_table(rest)}</div>"
    )


def _lineage(files: RunFiles) -> str:
    parents = [
        (str(parent.get("kind", "")), str(parent.get("name", "")), str(parent.get("fingerprint") or ""))
        for parent in files.parents
    ] or ([("base", files.base, "")] if files.base else [])
    if not parents:
        return ""
    boxes = [_artefact(kind, name, fingerprint) for kind, name, fingerprint in parents]
    kind = "adapter" if files.setting("adapter") else "model"
    this = _artefact(f"this run's {kind}", files.name, "")
    return f'<ul class="lineage">{"<li>+</li>".join(boxes)}<li class="arrow" aria-label="became">→</li>{this}</ul>'


def _artefact(kind: str, name: str, fingerprint: str) -> str:
    mark = f"<code>{escape(fingerprint[:16])}</code>" if fingerprint else ""
    return f"<li><span>{escape(kind)}</span>{escape(name)}{mark}</li>"


def _facts(files: RunFiles) -> str:
    settings = {
        "method": files.setting("method"),
        "adapter": _named(files.setting("adapter"), ("type", "r", "alpha", "dropout", "target"))
        or "none, full fine-tuning",
        "precision": files.setting("model.precision"),
        "optimiser": files.setting("optim.name"),
        "learning rate": files.setting("optim.lr"),
        "schedule": files.setting("optim.schedule"),
        "tokens per step": files.setting("train.batch_tokens"),
        "samples per step": files.setting("train.batch_samples"),
        "longest row": files.setting("train.max_length"),
        "packing": files.setting("train.packing"),
        "seed": files.setting("train.seed"),
    }
    best = files.best_evaluation
    result = {
        "steps": f"{files.last_step:,}",
        "duration": text.seconds(files.seconds) if files.seconds else None,
        "checkpoints": len(files.of("checkpoint")) or None,
        "best": f"step {best['step']:,}, held-out loss {text.loss(best['eval_loss'])}" if best else None,
        "folder": str(files.run.resolve()),
    }
    groups = {
        "Model": {
            "base": files.base or None,
            "revision": files.setting("model.revision"),
            **_mapping(files.facts.get("model")),
        },
        "Settings": settings if files.config else {},
        "Data": {
            "train": _source(files.setting("data.train")),
            "held out": _source(files.setting("data.eval")),
            **_mapping(files.facts.get("data")),
        },
        "Run": result,
        "Machine": {"device": files.facts.get("device"), **_mapping(files.facts.get("versions"))},
    }
    panels = "".join(
        f'<div class="panel"><h3>{title}</h3>{table}</div>'
        for title, facts in groups.items()
        if (table := _table(facts))
    )
    full = yaml.safe_dump(dict(files.config), sort_keys=False, allow_unicode=True) if files.config else ""
    details = f"<details><summary>run.yaml, every key</summary><pre>{escape(full)}</pre></details>" if full else ""
    return f'<div class="columns">{panels}</div>{details}'


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _named(value: Any, keys: tuple[str, ...]) -> str:
    """Return the chosen keys of a mapping as ``lora, r 16, alpha 32``."""
    if not isinstance(value, Mapping):
        return ""
    parts = [
        f"{key} {_plain(value[key])}" if key != "type" else str(value[key])
        for key in keys
        if value.get(key) is not None
    ]
    return ", ".join(parts)


def _source(value: Any) -> Any:
    """Return a data source of the run file in words."""
    if isinstance(value, list):
        return ", ".join(str(_source(one)) for one in value)
    if isinstance(value, Mapping):
        return str(value.get("path", value))
    if isinstance(value, float) and 0 < value < 1:
        return f"{value * 100:.4g} % of train"
    return value


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{text.words(str(key))} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return text.number(value)


def _table(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(text.words(str(key)))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in facts.items()
        if value is not None and value != {} and value != []
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _checkpoints(files: RunFiles) -> str:
    saved = files.of("checkpoint")
    if not saved:
        return ""
    best = files.best_evaluation
    rows = "".join(
        f"<tr><td>{escape(Path(str(record.get('path', ''))).name)}{' · best' if best and record.get('step') == best['step'] else ''}</td>"
        f'<td class="n">{text.size(record["bytes"]) if record.get("bytes") is not None else "–"}</td>'
        f'<td class="n">{_time(record.get("seconds"))}</td><td class="n">{_time(record.get("stall_seconds"))}</td></tr>'
        for record in saved
    )
    head = '<tr><th>Published</th><th class="n">Size</th><th class="n">Written in</th><th class="n">Training waited</th></tr>'
    return f'<div class="panel scroll"><table>{head}{rows}</table></div>'


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else text.seconds(seconds)


def _notes(files: RunFiles) -> str:
    rows = []
    for record in files.records:
        if record.get("kind") == "note":
            rows.append((record.get("step"), str(record.get("message", ""))))
        elif record.get("skipped"):
            rows.append((record.get("step"), f"skipped: {record.get('reason') or 'loss or gradient not finite'}"))
    if not rows:
        return ""
    cells = "".join(
        f'<tr><td style="width:6em">{text.number(step)}</td><td>{escape(message)}</td></tr>' for step, message in rows
    )
    return f'<div class="panel scroll"><table><tr><th>Step</th><th></th></tr>{cells}</table></div>'
