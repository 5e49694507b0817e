"""The proof: plain libraries, in a process that never saw luthier, compute the trained model's logits.

Like is compared with like: same dtype, device, attention and threads, evaluation mode, no fast forms. On a CPU the
logits must be equal bit for bit. Elsewhere they may differ by the noise that repeating the same computation shows;
and because a bound that is wider than what training changed would prove nothing, the adapter's own effect must be at
least ten times the bound, or the proof says ``inconclusive``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from luthier.artifacts.names import of_layer
from luthier.errors import ArtifactError
from luthier.export.proof import prober
from luthier.models.quantised.layer import quantised_layers

PROBE_TOKENS = 48
MARGIN = 10
MESSAGES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What did you learn? 你学到了什么？"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ü?"}],
    [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "  C\n"}],
]
TEXTS = ["The quick brown fox — 12,345.67 €", "  indented\n\ttabs", "你好，世界 👋🏽", '{"key": [1, 2.5, null]}']

Verdict = Literal["passed", "inconclusive", "failed"]


@dataclass(frozen=True)
class Probe:
    """What is asked of a model: token ids, and how it is held while it answers."""

    ids: list[list[int]]
    dtype: str
    device: str
    attention: str | None
    threads: int
    deterministic: bool
    trust_remote_code: bool = False
    layered: bool = False
    """Layer by layer from the start; without, only where the model does not fit on the device."""
    quantisation: dict[str, Any] | None = None
    """How the base under an adapter, or a model alone, is quantised as it is opened: `precision`, and `skip`, the linear layers left in 16 bits."""
    dequantise: bool = False
    """Answer with the values that quantised weights stand for, in `dtype` throughout; and beside that by the kernels (`Answers.kernels`)."""


@dataclass
class Answers:
    """Logits by probe (float32, tokens × vocabulary), the noise between two repetitions, and the tokenizer's answers."""

    logits: list[torch.Tensor]
    noise: float
    rendered: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    plain: list[torch.Tensor] = field(default_factory=list)
    layered: bool = False
    rounded: list[torch.Tensor] = field(default_factory=list)
    kernels: list[torch.Tensor] = field(default_factory=list)
    """What the quantised layers' own kernels answered, where the rest is of their dequantised values."""


@dataclass(frozen=True)
class Proof:
    """The outcome, as written to ``proof.json``."""

    verdict: Verdict
    passed: bool
    max_difference: float
    bound: float
    effect: float | None
    compared: str
    says: str
    differences: tuple[str, ...] = ()
    unquantised: float | None = None
    """How far the logits are from those of the same adapter on the base without quantisation; None where that was not asked."""
    format: int = 1

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n"


def make_probe(model: Any, samples: Sequence[Sequence[int]], *, deterministic: bool, trust_remote_code: bool) -> Probe:
    """Choose probes: the starts of a few real samples."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Probe(
        ids=[[int(token) for token in ids[:PROBE_TOKENS]] for ids in samples],
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(parameter.device),
        attention=getattr(base.config, "_attn_implementation", None),
        threads=torch.get_num_threads(),
        deterministic=deterministic,
        trust_remote_code=trust_remote_code,
        quantisation=_quantisation(base),
    )


def _quantisation(base: nn.Module) -> dict[str, Any] | None:
    """What plain libraries have to be told to quantise a base as this one is; nothing where its folder says so itself."""
    layers = quantised_layers(base)
    if not layers or layers[0].is_given:
        return None
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    skip = sorted({of_layer(name) for name in linear if ".lora_" not in name})
    return {"precision": layers[0].form, "skip": skip}


def live_answers(model: nn.Module, tokenizer: Any, probe: Probe) -> Answers:
    """The logits of a live model in plain form and evaluation mode; its mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits, again = (
                [
                    model(input_ids=torch.tensor([ids], device=probe.device), use_cache=False).logits[0].float().cpu()
                    for ids in probe.ids
                ]
                for _ in range(2)
            )
    finally:
        model.train(was_training)
    rendered, tokens = prober.read_texts(tokenizer, MESSAGES, TEXTS)
    return Answers(logits, largest_difference(logits, again), rendered, tokens)


def plain_answers(
    folder: Path,
    probe: Probe,
    *,
    base: str | None = None,
    rounding: float | None = None,
    tokenizer: bool = True,
    together: Sequence[tuple[Path, float]] | None = None,
) -> Answers:
    """The logits that plain transformers or peft compute from a folder, in a process of its own.

    Args:
        rounding: also answer with the adapted weights disturbed at random by up to this share of each.
        tokenizer: also ask the folder's tokenizer; an adapter may have none.
        together: adapters, of which ``folder`` is the first, that are active at once, each times its weight.

    Raises:
        ArtifactError: the folder does not open there; the text carries that process's error.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        request = {
            **asdict(probe),
            "folder": str(folder.resolve()),  # the process runs in a folder of its own
            "base": str(Path(base).resolve()) if base is not None and Path(base).is_dir() else base,
            "rounding": rounding,
            "together": [[str(path.resolve()), weight] for path, weight in together or ()],
            "tokenizer": tokenizer,
            "messages": MESSAGES,
            "texts": TEXTS,
            "out": str(out),
        }
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request))
        command = [sys.executable, "-P", str(prober.__file__), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        if done.returncode != 0:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
            raise ArtifactError(
                f"plain transformers/peft cannot open it: {last[0] if last else f'exit code {done.returncode}'}",
                code="does-not-open",
                where=str(folder),
                remedy="The checkpoints are kept. Run again with --debug for that process's whole output.",
            ) from RuntimeError(done.stderr)
        tensors = load_file(out)
        told = json.loads(Path(f"{out}.json").read_text())
    if told["luthier"]:
        raise ArtifactError(
            "the proving process had luthier loaded, so it proves nothing.", code="proof", where=str(folder)
        )
    count = range(len(probe.ids))
    logits = [tensors[f"probe{i}"] for i in count]
    noise = largest_difference(logits, [tensors[f"again{i}"] for i in count])
    plain = [tensors[f"plain{i}"] for i in count if f"plain{i}" in tensors]
    rounded = [tensors[f"rounded{i}"] for i in count if f"rounded{i}" in tensors]
    kernels = [tensors[f"kernel{i}"] for i in count if f"kernel{i}" in tensors]
    return Answers(logits, noise, told["rendered"], told["tokens"], plain, told["layered"], rounded, kernels)


def compare(expected: Answers, found: Answers, *, device: str, before: list[torch.Tensor] | None = None) -> Proof:
    """Compare two models' answers.

    Args:
        before: the logits before training, where ``found`` can't tell (it can for an adapter).
    """
    differences = []
    if [x.shape for x in expected.logits] != [x.shape for x in found.logits]:
        differences.append("the logits have another shape: another vocabulary or architecture")
        difference = float("inf")
    else:
        difference = largest_difference(expected.logits, found.logits)
    if expected.rendered != found.rendered:
        differences.append("the chat template renders the probe conversation differently")
    if expected.tokens != found.tokens:
        differences.append("the tokenizer splits the probe texts differently")
    bound = 0.0 if torch.device(device).type == "cpu" else max(expected.noise, found.noise)
    if not difference <= bound:
        differences.append(f"logits differ by up to {difference:.3g}, more than the bound {bound:.3g}")
    reference = found.plain or before
    effect = _moved(found.logits, reference) if reference and not differences else None
    tokens = sum(len(x) for x in expected.logits)
    compared = f"logits of {len(expected.logits)} prompts ({tokens} tokens), chat template, tokenizer; {device}{', layer by layer' if found.layered else ''}"
    if differences:
        return Proof(
            "failed", False, difference, bound, effect, compared, "; ".join(differences) + ".", tuple(differences)
        )
    how = "equal bits" if difference == 0 else f"equal within {bound:.3g}, the noise of repeating the computation"
    if effect is None and bound > 0:
        says = f"{how}, but what training changed could not be measured against that bound."
        return Proof("inconclusive", False, difference, bound, effect, compared, says)
    if effect is not None and (effect == 0 or effect < MARGIN * bound):
        says = f"{how}, but training changed these logits by only {effect:.3g}, so this would not tell the trained model from its base."
        return Proof("inconclusive", False, difference, bound, effect, compared, says)
    moved = "" if effect is None else f"; training moved them by up to {effect:.3g}"
    return Proof("passed", True, difference, bound, effect, compared, f"opened by plain libraries, {how}{moved}.")


def within(expected: Answers, found: Answers, *, dtype: str, device: str) -> Proof:
    """Compare a merged model with its base and adapter, which differ by the rounding of the sum.

    The bound is four times what disturbing the adapted weights by one rounding of ``dtype`` moved the logits, and the
    error of fp32 sums in another order (1e-5 of the largest logit).
    """
    if [x.shape for x in expected.logits] != [x.shape for x in found.logits]:
        says = "the logits have another shape: another vocabulary or architecture."
        return Proof("failed", False, float("inf"), 0.0, None, f"logits; {device}", says, (says,))
    difference = largest_difference(expected.logits, found.logits)
    largest = max(float(tensor.abs().max()) for tensor in expected.logits)
    rounding = largest_difference(expected.logits, expected.rounded) if expected.rounded else 0.0
    bound = 4 * rounding + 1e-5 * largest
    effect = _moved(expected.logits, expected.plain)
    tokens = sum(len(x) for x in expected.logits)
    compared = f"logits of {len(expected.logits)} prompts ({tokens} tokens) with base and adapter in peft, both in fp32; {device}"
    if not difference <= bound:
        says = f"logits differ by up to {difference:.3g}, more than the bound {bound:.3g} that rounding to {dtype} explains."
        return Proof("failed", False, difference, bound, effect, compared, says, (says,))
    how = f"equal to base and adapter within {difference:.3g} (rounding to {dtype} explains up to {bound:.3g})"
    if effect < MARGIN * bound:
        says = f"{how}, but the adapter moves these logits by only {effect:.3g}, so the bound would hide a part of it."
        return Proof("inconclusive", False, difference, bound, effect, compared, says)
    return Proof("passed", True, difference, bound, effect, compared, f"opened by plain libraries, {how}; the adapter moved them by up to {effect:.3g}.")  # fmt: skip


def _moved(after: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> float:
    """How far training moved the logits of the tokens that both vocabularies have."""
    shared = [min(left.shape[-1], right.shape[-1]) for left, right in zip(after, before, strict=True)]
    return largest_difference(
        [tensor[..., :count] for tensor, count in zip(after, shared)],
        [tensor[..., :count] for tensor, count in zip(before, shared)],
    )


def largest_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest absolute difference; infinite where one is not a number and the other is."""
    largest = 0.0
    for left, right in zip(ours, theirs, strict=True):
        if torch.equal(left, right) or not left.numel():
            continue
        difference = (left.double() - right.double()).abs()
        same = (left == right) | (left.isnan() & right.isnan())
        difference = torch.where(same, 0.0, torch.nan_to_num(difference, nan=float("inf")))
        largest = max(largest, float(difference.max()))
    return largest
