"""After the last step: ask the live model, let go of it, and have plain libraries answer the same from the final folder."""

from __future__ import annotations

import gc
import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts import manifest as manifests
from luthier.artifacts.manifest import versions
from luthier.artifacts.run_folder import Found, folder_of, published
from luthier.checkpoint.checkpoints import Checkpoints
from luthier.config.schema import RunConfig
from luthier.data.prepare import Prepared
from luthier.errors import LuthierError
from luthier.export.final import make_final
from luthier.export.proof.prove import Answers, Probe, Proof, largest_difference, live_answers, make_probe
from luthier.models import stack
from luthier.models.compile import undo
from luthier.models.memory import keep
from luthier.models.open import Base
from luthier.models.quantised import layer as quantised
from luthier.report.card import model_card
from luthier.report.metrics import read_metrics
from luthier.report.page import write_report
from luthier.training import base_folder
from luthier.training.events import Event, Events
from luthier.training.loop import Parts
from luthier.training.state import State

Say = Callable[[str], None]
PROBES = 3


@dataclass(frozen=True)
class Trained:
    """What is left of a run when the model is gone: the live model's answers, and what to say of it."""

    config: RunConfig
    run: Path
    state: State
    expected: Answers
    probe: Probe
    facts: dict[str, Any]
    before: Path | None
    events: Events
    total_steps: int


def ask_live_model(parts: Parts, base: Base, state: State, prepared: Prepared) -> Trained:
    """Record the live model's logits in plain form; afterwards the caller drops the model and its optimiser."""
    samples = prepared.eval or prepared.train
    probe = make_probe(
        parts.model,
        [samples[index][0].tolist() for index in range(min(PROBES, len(samples)))],
        deterministic=parts.config.train.deterministic,
        trust_remote_code=parts.config.model.trust_remote_code,
    )
    if parts.config.train.compile:
        undo(base.model)
    if parts.config.train.memory == "recompute":
        keep(base.model)
    as_pair = live_answers(parts.model, base.tokenizer, probe) if stack.is_stacked(parts.model) else None
    with stack.plain_form(parts.model), quantised.plain_form(parts.model) as multiplies_otherwise:
        expected = live_answers(parts.model, base.tokenizer, probe)
    own = live_answers(parts.model, base.tokenizer, probe) if multiplies_otherwise else None
    facts = {**parts.checkpoints.facts, "versions": versions()}
    if as_pair is not None:  # the two adapters' products are added in another order than the one adapter's
        difference = largest_difference(as_pair.logits, expected.logits)
        facts["stack"] = {**facts["stack"], "difference": difference}
    if own is not None:
        facts["plain_form"] = {"difference": largest_difference(own.logits, expected.logits)}
    facts["total_steps"] = parts.total_steps
    before = _before(parts, base)
    return Trained(parts.config, parts.run, state, expected, probe, facts, before, parts.events, parts.total_steps)


def _before(parts: Parts, base: Base) -> Path | None:
    """The folder that training began from; a resumed full fine-tuning has opened a checkpoint of its own instead."""
    given, opened = Path(parts.config.model.path), base.source.path
    if (given / "config.json").is_file():
        return given
    if opened is not None and opened.is_dir() and not opened.resolve().is_relative_to(parts.run.resolve()):
        return opened
    return base_folder.existing(parts.run)


def prove(trained: Trained, say: Say) -> tuple[Path, Proof]:
    """Make the final folder and its proof in a process that has the device to itself, then say where everything is.

    Raises:
        ArtifactError: the proof failed; the checkpoints are kept.
    """
    gc.collect()
    if torch.device(trained.probe.device).type == "cuda":
        torch.cuda.empty_cache()
    run, step = trained.run, trained.state.step
    begun = time.perf_counter()

    def card(folder: Path, kind: str) -> str:
        return model_card(
            run,
            kind="adapter" if kind == "adapter" else "model",
            open_with=how_to_open(kind, trained.probe),
            final=folder,
        )

    try:
        final, proof = make_final(
            run, folder_of(run, step), trained.expected, trained.probe,
            facts=trained.facts, card=card, base=trained.before,
        )  # fmt: skip
    finally:
        write_page(run, say)
    if "difference" in trained.facts.get("stack", {}):
        say(
            f"saved as one adapter; its logits differ from the stacked pair's by up to {trained.facts['stack']['difference']:.3g}"
        )
    if "plain_form" in trained.facts:
        say(_plain_form_says(trained))
    say(f"proof: {proof.verdict} in {time.perf_counter() - begun:.1f} s; {proof.says}")
    trained.events.emit(Event("end", step, trained.total_steps, run, {}, final))
    _closing(trained, final, say)
    return final, proof


def _plain_form_says(trained: Trained) -> str:
    how = {
        "int8": "plain libraries multiply int8 with activations rounded too (LLM.int8())",
        "fp8": "plain libraries have no fp8 products, so the proof compares with a 16-bit model that holds the same weights",
    }
    assert trained.probe.quantisation is not None
    difference = trained.facts["plain_form"]["difference"]
    return f"{how[trained.probe.quantisation['precision']]}; in training's own form the logits differ from that by up to {difference:.3g}"


def is_finished(run: Path, step: int, total: int) -> bool:
    """Whether the final folder is whole, proven, and the result of this step of a run of this length."""
    final = run / "final"
    if not (final / "proof.json").is_file():
        return False
    manifest, problems = manifests.check_whole(final)
    return manifest is not None and not problems and manifest.facts.get("step") == step and manifest.facts.get("total_steps") == total  # fmt: skip


def settle(checkpoints: Checkpoints, say: Say) -> None:
    """Let a save in flight be published before an error ends the run; its own failure is only said."""
    try:
        checkpoints.wait()
    except (LuthierError, OSError) as error:
        say(f"the last checkpoint could not be written: {error}")


def write_page(run: Path, say: Say) -> None:
    """Write report.html; a picture never costs a run."""
    try:
        write_report(run)
    except (LuthierError, OSError, ValueError, KeyError) as error:
        say(f"report.html could not be written: {error}")


def best_checkpoint(run: Path) -> Found | None:
    """The kept checkpoint whose step had the lowest held-out loss."""
    losses = {
        record["step"]: record["eval_loss"]
        for record in read_metrics(run / "metrics.jsonl")
        if record["kind"] == "eval" and record["step"] > 0 and record["eval_loss"] is not None
    }
    kept = [found for found in published(run) if found.step in losses]
    return min(kept, key=lambda found: losses[found.step], default=None)


def how_to_open(kind: str, probe: Probe | None = None) -> str:
    """Python that opens a final folder with plain libraries; ``FOLDER`` stands for its place.

    Args:
        probe: how it was asked; says whether, and how, the base is quantised.
    """
    if probe is not None and probe.quantisation is not None:
        return _on_quantised(probe.quantisation, probe.dtype)
    name = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
    library = "peft" if kind == "adapter" else "transformers"
    return f"""from {library} import {name}
from transformers import AutoTokenizer

model = {name}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def _on_quantised(quantisation: dict[str, Any], dtype: str) -> str:
    skip = f"llm_int8_skip_modules={quantisation['skip']!r}"
    forms = {
        "nf4": f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="{dtype}", {skip}',
        "int8": f"load_in_8bit=True, {skip}",
    }
    form = forms.get(quantisation["precision"])
    if form is None:
        return """import luthier  # plain libraries open the base in 16 bits only; trained on fp8, it is then a little off

model, tokenizer = luthier.load("FOLDER")"""
    return f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig

how = BitsAndBytesConfig({form})
model = AutoPeftModelForCausalLM.from_pretrained("FOLDER", quantization_config=how, dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""


def _closing(trained: Trained, final: Path, say: Say) -> None:
    state, run = trained.state, trained.run
    say(f"the {'adapter' if trained.config.adapter else 'model'} is in {final}")
    if state.best_loss is not None and state.best_step != state.step and math.isfinite(state.best_loss):
        kept = best_checkpoint(run)
        if kept and kept.step == state.best_step:
            say(f"the lowest held-out loss was at step {state.best_step} ({state.best_loss:.4f}): {run}@best")
    say(f"talk to it: luthier chat {shlex.quote(str(final))}")
    say(f"look at it: {run / 'report.html'}")


def stored_proof(final: Path) -> dict[str, Any]:
    """The content of a final folder's ``proof.json``."""
    return json.loads((final / "proof.json").read_text())
