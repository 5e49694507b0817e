"""The proof of a GGUF: real llama.cpp opens it and answers what the model it was made from answers.

Three things are compared. Every weight, read back by the gguf package, with the original: within what its kind can hold.
Tokens of tricky strings and the rendered template: equal. Logits: llama.cpp computes with the file's weights, but rounds
the inputs of each product to fp16, bf16 or 8 bits with weights of such kinds; how far that moves the logits is
measured with plain transformers on the same weights; the bound is four times the largest and twice the usual difference.
What the quantisation itself moved them by is reported beside. In F32 and F16 also the greedy answer must be the original's.

Without llama.cpp (package xllamacpp) transformers opens the file instead, where it can; the proof then says that
the tokens were not compared.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from luthier.artifacts.tensorfile import TensorSpec
from luthier.errors import ArtifactError
from luthier.export.gguf import llama_prober, reference
from luthier.export.gguf.texts import compare_texts, proof_texts
from luthier.export.proof.exports import checked
from luthier.export.proof.prove import MARGIN, MESSAGES, PROBE_TOKENS, TEXTS, Probe, Proof, plain_answers
from luthier.models.room import free_bytes

MOST = 1000  # log-probabilities asked of llama.cpp at each place
GREEDY = 16  # tokens
# The largest relative error of a weight that a kind's own coarseness explains.
COARSE = {"F32": 2.0**-22, "F16": 2.0**-10, "BF16": 2.0**-8, "Q8_0": 0.02, "Q6_K": 0.06, "Q5_K": 0.12, "Q4_K": 0.24}


def prove_gguf(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, tuple[str, int, float]],
    specs: Mapping[str, TensorSpec],
    *,
    coarse: float | None = None,
) -> Callable[[Path], bytes]:
    """A proof that a GGUF answers what the transformers folder it was made from answers.

    Args:
        weights: by the model's name of each weight: the file's, the heads it is interleaved by, and what was added.
        coarse: the largest relative difference of a weight, where the folder was made from the file.
    """

    def prove(file: Path) -> bytes:
        proof = _Proving(folder, config, tokenizer, weights, file, coarse).prove(_fits(specs))
        return checked(proof, file.parent if coarse is None else folder)

    return prove


def prove_lora(folder: Path, base: Path, file: Path, specs: Mapping[str, TensorSpec], model: Path | None) -> bytes:
    """A proof that llama.cpp with an adapter's GGUF answers what peft answers with the adapter's folder.

    Args:
        specs: the base's tensors.
        model: the base as a GGUF in fp32; None where llama.cpp is not installed.

    Raises:
        ArtifactError: the proof failed.
    """
    if model is None or not _fits(specs):
        why = "llama.cpp (package xllamacpp) is not installed" if model is None else "the base does not fit into this machine's memory in fp32"  # fmt: skip
        return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", f"{why}, so the file was not opened.").to_bytes()
    ids = [[(7 * place + 3 + start) % 97 + 3 for place in range(32)] for start in (0, 11, 40)]
    lengths = [[8, 24, 32]] * len(ids)
    probe = Probe(ids, "float32", "cpu", None, torch.get_num_threads(), False)
    expected = plain_answers(folder, probe, base=str(base), tokenizer=False)
    rows = expected.logits[0].shape[-1]
    request = {"file": str(model), "lora": [str(file), 1.0], "texts": [], "ids": ids, "lengths": lengths, "conversations": [], "greedy": None, "most": min(MOST, rows)}  # fmt: skip
    told, _ = _run(llama_prober, file, request)
    found, effect = [], 0.0
    for number, each in enumerate(lengths):
        ours, before = (logits[number].double().log_softmax(-1) for logits in (expected.logits, expected.plain))
        effect = max(effect, float((ours - before).abs().max()))
        for length, (likely, theirs) in zip(each, told["logprobs"][number], strict=True):
            found.append(torch.tensor(theirs, dtype=torch.float64) - ours[length - 1, torch.tensor(likely)])
    difference = _Difference.of(found).largest
    bound = 1e-3 * max(float(logits.abs().max()) for logits in expected.logits)
    if file.stem.endswith("F16"):
        bound += 0.05 * effect
    compared = f"{sum(map(len, lengths))} next-token distributions of llama.cpp (base in F32, --lora) with base and adapter in peft, both in fp32; cpu"  # fmt: skip
    if difference > bound:
        says = f"log-probabilities differ by up to {difference:.3g}, more than the bound {bound:.3g}."
        return checked(Proof("failed", False, difference, bound, effect, compared, says, (says,)), file.parent)
    if effect < MARGIN * bound:
        says = f"equal within {difference:.3g}, but the adapter moves these by only {effect:.3g}, so the bound {bound:.3g} would hide a part of it."
        return Proof("inconclusive", False, difference, bound, effect, compared, says).to_bytes()
    says = f"llama.cpp with --lora answers what base and adapter answer within {difference:.3g}; the adapter moved log-probabilities by up to {effect:.3g}."
    return Proof("passed", True, difference, bound, effect, compared, says).to_bytes()


@dataclass(frozen=True)
class _Difference:
    """Of many log-probabilities: the largest one, and the root of the mean square."""

    largest: float
    usual: float

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> _Difference:
        every = torch.nan_to_num(torch.cat(list(parts)), nan=float("inf")).abs()
        return cls(float(every.max()), float(every.square().mean().sqrt()))


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class _Proving:
    def __init__(
        self, folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase,
        weights: Mapping[str, tuple[str, int, float]], file: Path, coarse: float | None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.tokenizer, self.weights, self.file = folder, config, tokenizer, weights, file
        self.coarse = coarse
        self.quant = "the change" if coarse is not None else file.stem.rsplit("-", 1)[-1]
        self.rows = rows = config.get_text_config().vocab_size
        probes = [ids for text in TEXTS if (ids := tokenizer(text)["input_ids"][:PROBE_TOKENS])]
        self.ids = [ids for ids in probes if max(ids) < rows]
        if not self.ids:  # the tokenizer knows only tokens without a row
            self.ids = [[(7 * place + 3) % rows for place in range(32)]]
        self.lengths = [sorted({len(ids), max(1, len(ids) // 2), min(4, len(ids))}) for ids in self.ids]
        self.most = min(MOST, rows)

    def prove(self, fits: bool) -> Proof:
        llama = self._llama_cpp() if has_llama_cpp() else None
        if not fits:
            return self._without_weights(llama)
        logits, told = self._reference(opens=llama is None)
        differences = [
            f"a weight of kind {kind} differs from the original by {error:.3g} of its size"
            for kind, error in told["errors"].items()
            if not error <= (COARSE.get(kind, 0.3) if self.coarse is None else self.coarse)
        ]
        differences += [f"transformers' model has no weight {name}" for name in told["unread"]]
        moved = max(float((logits[f"file{i}"] - logits[f"original{i}"]).abs().max()) for i in range(len(self.ids)))
        if llama is None:
            return self._by_transformers(logits, told, differences, moved)
        texts = compare_texts(self.tokenizer, self.rows, llama["tokens"], llama["rendered"])
        covered, differences = texts.covered, [*differences, *texts.differences]
        found, noise, largest = self._apart(llama, logits)
        bound = 4 * noise.largest + 1e-4 * largest
        if not found.largest <= bound or not found.usual <= 2 * noise.usual + 3e-5 * largest:
            differences.append(f"log-probabilities differ by up to {found.largest:.3g} and usually by {found.usual:.3g} from those of the file's own weights in transformers, where llama.cpp's rounding explains {bound:.3g} and {2 * noise.usual:.3g}")  # fmt: skip
        if self.quant in ("F32", "F16"):
            covered.append(self._greedy(llama, told["greedy"], bound, differences))
        compared = f"{', '.join(covered)}, {sum(map(len, self.lengths))} next-token distributions with plain transformers in fp32; cpu"  # fmt: skip
        if differences:
            return Proof(
                "failed", False, found.largest, bound, moved, compared, "; ".join(differences) + ".", tuple(differences)
            )
        says = f"opened by llama.cpp, which computes what the file's weights say within {found.largest:.3g}, usually {found.usual:.3g} (its rounding usually makes {noise.usual:.3g}); {self.quant} itself moved the logits by up to {moved:.3g}."  # fmt: skip
        if texts.spaces:
            return Proof("inconclusive", False, found.largest, bound, moved, compared, f"{says} But {texts.spaces}.")
        return Proof("passed", True, found.largest, bound, moved, compared, says)

    def _llama_cpp(self) -> dict[str, Any]:
        return _run(
            llama_prober,
            self.file,
            {
                "file": str(self.file), "lora": None, "texts": proof_texts(self.tokenizer, self.rows), "ids": self.ids, "lengths": self.lengths,
                "conversations": MESSAGES if self.tokenizer.chat_template else [], "greedy": self._asked(), "most": self.most,
            },
        )[0]  # fmt: skip

    def _reference(self, *, opens: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        told, tensors = _run(
            reference,
            self.file,
            {
                "folder": str(self.folder), "file": str(self.file), "ids": self.ids, "greedy": self._asked(),
                "weights": {name: list(entry) for name, entry in self.weights.items()}, "opens": opens,
            },
        )  # fmt: skip
        return tensors, told

    def _asked(self) -> list[Any] | None:
        return [self.ids[0], GREEDY] if self.quant in ("F32", "F16") else None

    def _apart(
        self, llama: Mapping[str, Any], logits: Mapping[str, torch.Tensor]
    ) -> tuple[_Difference, _Difference, float]:
        """How far llama.cpp, and transformers rounding as it does, are from the file's weights; the largest logit."""
        found, noise, largest = [], [], 0.0
        for number, lengths in enumerate(self.lengths):
            ours, rounded = (logits[f"{name}{number}"].double().log_softmax(-1) for name in ("file", "rounded"))
            largest = max(largest, float(logits[f"file{number}"].abs().max()))
            for length, (ids, theirs) in zip(lengths, llama["logprobs"][number], strict=True):
                reference = ours[length - 1, torch.tensor(ids)]
                found.append(torch.tensor(theirs, dtype=torch.float64) - reference)
                noise.append(rounded[length - 1, torch.tensor(ids)] - reference)
        return _Difference.of(found), _Difference.of(noise), largest

    def _greedy(self, llama: Mapping[str, Any], ours: Sequence[Any], bound: float, differences: list[str]) -> str:
        tokens, leads = ours
        for place, (left, right, lead) in enumerate(zip(tokens, llama["greedy"], leads, strict=True)):
            if left == right:
                continue
            if lead > 2 * bound:
                differences.append(f"the greedy answer differs from its token {place + 1} on")
            return f"the greedy answer up to token {place + 1}, where two are equally likely"
        return f"the greedy answer of {len(tokens)} tokens"

    def _by_transformers(
        self, logits: Mapping[str, torch.Tensor], told: Mapping[str, Any], differences: list[str], moved: float
    ) -> Proof:
        compared = "every weight, read by the gguf package; not the tokens and not llama.cpp's logits, since llama.cpp (package xllamacpp) is not installed; cpu"  # fmt: skip
        if differences:
            return Proof("failed", False, moved, 0.0, moved, compared, "; ".join(differences) + ".", tuple(differences))
        if "opened0" not in logits:
            says = f"the file holds the model's weights, but transformers does not open it ({told.get('opened')})."
            return Proof("inconclusive", False, moved, 0.0, moved, compared, says)
        found = max(float((logits[f"opened{i}"] - logits[f"file{i}"]).abs().max()) for i in range(len(self.ids)))
        bound = 1e-4 * max(float(logits[f"file{i}"].abs().max()) for i in range(len(self.ids)))
        if found > bound:
            says = f"the file holds the model's weights, but transformers' own reading of it answers differently by {found:.3g}, so only llama.cpp can tell."  # fmt: skip
            return Proof("inconclusive", False, found, bound, moved, compared, says)
        says = f"opened by plain transformers, equal to the file's weights within {found:.3g}; {self.quant} itself moved the logits by up to {moved:.3g}."  # fmt: skip
        return Proof("passed", True, found, bound, moved, compared, says)

    def _without_weights(self, llama: Mapping[str, Any] | None) -> Proof:
        if llama is None:
            says = "the model does not fit into this machine's memory, and llama.cpp is not installed, so it was not opened."
            return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says)
        texts = compare_texts(self.tokenizer, self.rows, llama["tokens"], llama["rendered"])
        covered, differences = ", ".join(texts.covered), texts.differences
        if differences:
            return Proof("failed", False, 0.0, 0.0, None, covered, "; ".join(differences) + ".", tuple(differences))
        says = "opened by llama.cpp with the same tokens; the original does not fit into this machine's memory in fp32, so logits were not compared."  # fmt: skip
        return Proof("inconclusive", False, 0.0, 0.0, None, covered, says)


def _fits(specs: Mapping[str, TensorSpec]) -> bool:
    """Whether plain transformers can hold the model in fp32 beside what else is in memory."""
    free = free_bytes("cpu")
    counts = 0
    for spec in specs.values():
        count = 1
        for extent in spec.shape:
            count *= extent
        counts += count
    return free is None or counts * 4 * 1.5 < free


def _run(script: Any, file: Path, request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run a script in a process of its own; its JSON and its tensors.

    Raises:
        ArtifactError: it failed; the text carries its error.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out, path = Path(scratch) / "out.safetensors", Path(scratch) / "request.json"
        target = Path(scratch) / "out.safetensors.json" if script is llama_prober else out
        path.write_text(json.dumps({**request, "threads": torch.get_num_threads(), "out": str(target)}))
        command = [sys.executable, "-P", str(script.__file__), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=scratch)
        if done.returncode != 0:
            what = "llama.cpp" if script is llama_prober else "plain transformers"
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
            raise ArtifactError(
                f"{what} cannot open it: {last[0] if last else f'exit code {done.returncode}'}",
                code="does-not-open",
                where=str(file.parent),
                remedy="Nothing was published. Run again with --debug for that process's whole output.",
            ) from RuntimeError(done.stderr)
        told = json.loads(Path(f"{out}.json").read_text())
        tensors = load_file(out) if out.is_file() else {}
    if told["luthier"]:
        raise ArtifactError("the proving process had luthier loaded, so it proves nothing.", code="proof", where=str(file.parent))  # fmt: skip
    return told, tensors
