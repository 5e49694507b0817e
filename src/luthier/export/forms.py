"""The verb: what lies at SRC becomes the form asked for at DST, proven."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.artifacts import identify as artifacts
from luthier.artifacts import manifest as manifests
from luthier.artifacts.manifest import Manifest
from luthier.artifacts.tensorfile import DEFAULT_SHARD
from luthier.checkpoint.retain import newest_whole
from luthier.errors import RequestError
from luthier.export import exported_folder as folders
from luthier.export.merged.as_trained import Quantised, quantised_in_training
from luthier.export.merged.combine import combination_of
from luthier.export.merged.dequantise import dequantised
from luthier.export.merged.merge import merge_folders
from luthier.export.merged.plan import FLOATS
from luthier.export.proof.exports import Values, prove_copy, prove_dequantised, prove_merge, prove_quantised_merge
from luthier.export.read_back import check_written
from luthier.export.sharded.bare import export_bare
from luthier.export.sharded.source import bare_weights
from luthier.export.source import Source, open_source
from luthier.export.stream import WHOLE, Output, write_stream
from luthier.export.unfinished import unfinished
from luthier.report import serving

FORMS = {  # and the flags that mean something there, beside --base, --with, --seed and --no-proof
    "merged": ("--dtype", "--shard-size", "--weights", "--combine", "--density", "--onto"),
    "transformers": ("--dtype", "--shard-size"),
    "adapter": ("--dtype", "--rank"),
    "gguf": ("--quant",),
    "quantized": ("--dtype", "--shard-size", "--format"),
}
ONTO = ("trained", "original")


@dataclass(frozen=True)
class Exported:
    """What was written, and how plain transformers opens it."""

    path: Path
    kind: str
    opens_with: str
    proof: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        proof = self.proof or "not proven"
        notes = "".join(f"\n- {note}" for note in self.notes)
        lines = [f"{self.path}: {self.kind}; {proof}{notes}"]
        if self.kind == "gguf":
            return "\n".join([*lines, f"open it: {self.opens_with}"])
        lines += [f"open it: {self.opens_with}({str(self.path)!r})", "serve it:"]
        return "\n".join([*lines, *(f"  {line}" for line in serving.commands(self.path))])


def weights_of(text: str | None) -> list[float] | None:
    """``0.7,0.3`` as numbers.

    Raises:
        RequestError: it holds something else.
    """
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise RequestError(
            f"{text!r} are no numbers.", code="form", where="--weights", remedy="Write 0.7,0.3."
        ) from None


def export_folder(
    sources: Sequence[Path],
    out: Path,
    *,
    to: str,
    base: Path | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    weights: Sequence[float] | None = None,
    combine: str | None = None,
    density: float | None = None,
    seed: int = 0,
    onto: str | None = None,
    quant: str | None = None,
    packing: str | None = None,
    rank: int | None = None,
    prove: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export to one of `FORMS`.

    Args:
        sources: one artefact; for ``merged`` also several adapters on the same base.
        base: the base under an adapter, where it isn't where the adapter says; giving it insists on it.
        weights: a factor for each adapter.
        combine: how several adapters become one change: linear (their weighted sum), ties, dare_linear, dare_ties, magnitude_prune.
        density: the share of values that the last four keep.
        seed: of what the dare methods drop.
        onto: where the adapter was trained on a quantised base: ``trained``, the values it saw, or ``original``, the
            weights before quantising (for a base that lies there quantised, those given as ``base``). Without it, the values that
            it saw; of a folder given as ``base``, what it holds.
        rank: of an adapter recovered from a merged model and its ``base``; from the spectrum of each layer without it.
        say: told of each layer as an adapter is recovered.

    Raises:
        RequestError: the form is unknown or does not go with what is there, or ``out`` exists.
        ArtifactError: a source is damaged or does not fit, or the proof failed.
    """
    if to not in FORMS:
        raise RequestError(f"there is no form {to!r}.", code="form", where="--to", remedy=f"Take one of {', '.join(FORMS)}.")  # fmt: skip
    given = {"--dtype": dtype, "--shard-size": shard_size, "--weights": weights, "--combine": combine, "--density": density, "--onto": onto, "--quant": quant, "--format": packing, "--rank": rank}  # fmt: skip
    strange = [flag for flag, value in given.items() if value is not None and flag not in FORMS[to]]
    if strange:
        fitting = " or ".join(form for form, flags in FORMS.items() if strange[0] in flags)
        instead = " --quant says how the one file is packed." if to == "gguf" else ""
        raise RequestError(f"{strange[0]} is not for the form {to}.", code="form", where=strange[0], remedy=f"Leave it out, or export --to {fitting}.{instead}")  # fmt: skip
    sources, out = [source.expanduser().resolve() for source in sources], out.expanduser().resolve()
    base = base.expanduser().resolve() if base is not None else None
    shard_bytes = folders.shard_bytes(shard_size, DEFAULT_SHARD)
    bare = bare_weights(sources[0]) if to == "transformers" and len(sources) == 1 else None
    if bare is not None:
        opens, notes = export_bare(bare, out, base=base, dtype=dtype, shard_bytes=shard_bytes, prove=prove)
        whole = "every tensor of the architecture is there, and no other"
        return Exported(out, to, f"{opens}.from_pretrained", proof_line(out) or whole, (whole, *notes) if prove else tuple(notes))  # fmt: skip
    if to == "transformers" and len(sources) == 1 and (file := _gguf_file(sources[0])) is not None:
        from luthier.export.gguf.source import export_from_gguf

        said = [*folders.said_of_exports([file.parent]), *export_from_gguf(file, out, dtype=dtype, shard_bytes=shard_bytes, prove=prove)]  # fmt: skip
        return Exported(out, to, "AutoModelForCausalLM.from_pretrained", proof_line(out), tuple(said))
    inner = [weights_folder(source) for source in sources]
    again = folders.said_of_exports(inner)
    is_adapter = [(folder / "adapter_config.json").is_file() for folder in inner]
    if to != "merged" and len(inner) > 1:
        raise RequestError(f"the form {to} is made from one artefact.", code="form", where="--with", remedy="Leave --with out.")  # fmt: skip
    if to == "gguf":
        under, known = base_of(inner[0], sources[0]) if is_adapter[0] and base is None else (base, None)
        return _to_gguf(inner[0], under if is_adapter[0] else None, known, out, quant, prove, again)
    if to == "quantized" and not is_adapter[0]:
        return _to_quantised(inner[0], out, packing, dtype, shard_bytes, prove, again)
    if to == "adapter" and not is_adapter[0] and base is not None:
        return _recovered(inner[0], out, base, dtype, rank, prove, again, say)
    if rank is not None:
        raise RequestError("--rank is for an adapter recovered from a merged model and its base.", code="form", where="--rank", remedy="Leave it out; or name a model as SRC, and its base with --base.")  # fmt: skip
    if (to in ("transformers", "quantized")) == is_adapter[0] or (to == "merged" and not all(is_adapter)):
        what = "an adapter" if is_adapter[0] else "a model"
        fitting = "merged, adapter or gguf" if is_adapter[0] else "transformers, gguf or quantized"
        if to == "adapter":
            fitting += ", or name its base (--base BASE), and the adapter is recovered from what differs"
        if is_adapter[0] and to == "quantized":
            fitting = "merged first, and what comes of that to quantized"
        raise RequestError(f"{inner[0]} is {what}, which cannot be exported to {to}.", code="form", where="--to", remedy=f"Export it to {fitting}.")  # fmt: skip
    if weights is not None and len(weights) != len(inner):
        raise RequestError(f"there are {len(inner)} adapters and {len(weights)} weights.", code="form", where="--weights", remedy="Give one number an adapter.")  # fmt: skip
    combination = combination_of(combine, density, seed)
    if combination is not None and len(inner) == 1:
        raise RequestError("there is one adapter, and nothing to combine it with.", code="combine", where="--combine", remedy="Name the others by --with.")  # fmt: skip
    said = []
    if to == "merged":
        chosen = _choose_base(inner, sources[0], base, onto)
        said += chosen.notes
        named, proof = chosen.values.folder, None
        if prove and chosen.seen is None:
            how = combination.method if combination is not None else None
            proof = prove_merge(named, inner, weights, combined=how)
        elif prove and chosen.seen is not None and len(inner) == 1 and weights is None:
            proof = prove_quantised_merge(inner[0], chosen.onto, chosen.seen, chosen.original)
        merge_folders(
            named, inner, out, dtype=dtype, weights=weights, combination=combination, quantised=chosen.values.quantised,
            shard_bytes=shard_bytes, expected_base=chosen.fingerprint, prove=proof, check=check_written if prove else None,
            report=said.append,
        )  # fmt: skip
    else:
        said = _copy(inner[0], out, dtype, shard_bytes, prove, adapter=to == "adapter")
    opens = "PeftModel.from_pretrained" if to == "adapter" else "AutoModelForCausalLM.from_pretrained"
    return Exported(out, to, opens, proof_line(out), (*again, *said))


def _to_gguf(
    folder: Path, base: Path | None, known: str | None, out: Path, quant: str | None, prove: bool, said: list[str]
) -> Exported:
    """A model's file, or with its base an adapter's; what transformers is needed for is imported here, not by other forms."""
    from luthier.export.gguf.lora import export_gguf_lora
    from luthier.export.gguf.write import export_gguf

    if base is not None:
        made = export_gguf_lora(folder, base, out, quant=quant, expected_base=known, prove=prove)
    else:
        made = export_gguf(folder, out, quant=quant, prove=prove)
    return Exported(out / made.file, "gguf", made.served(out), made.proof, tuple(said))


def _to_quantised(
    folder: Path, out: Path, packing: str | None, dtype: str | None, shard_bytes: int, prove: bool, said: list[str]
) -> Exported:
    from luthier.export.quantised import export_quantised, form_of

    form = form_of(packing)
    notes = export_quantised(folder, out, form=form, dtype=dtype, shard_bytes=shard_bytes, prove=prove)
    opens = "AutoModelForCausalLM.from_pretrained"
    return Exported(out, "quantized", f"vllm serve, or {opens}" if form == "fp8" else opens, proof_line(out), (*said, *notes))  # fmt: skip


def _recovered(
    merged: Path, out: Path, base: Path, dtype: str | None, rank: int | None, prove: bool, said: list[str], say: Callable[[str], None]
) -> Exported:  # fmt: skip
    """An adapter out of what differs between a model and its base; mending does the same and more."""
    from luthier.export.mend.mend import mend

    if dtype is not None:
        raise RequestError("a recovered adapter is in fp32, since it is computed from a difference.", code="form", where="--dtype", remedy="Leave --dtype out; exporting the adapter again casts it.")  # fmt: skip
    folders.check_target(out, [merged, base])
    made = mend(merged, out, base=base, rank=rank, recover_adapter=True, prove=prove, say=say)
    notes = (*said, *(step["what"] for step in made.done), *made.table.splitlines())
    return Exported(out, "adapter", "PeftModel.from_pretrained", made.checked, notes)


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file of a model that a path means: itself, or the only one in a folder of them."""
    if not path.exists() or artifacts.identify(path).kind != "gguf":
        return None
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def proof_line(out: Path) -> str | None:
    """What a folder's proof says."""
    told = json.loads((out / "proof.json").read_text()) if (out / "proof.json").is_file() else None
    return f"{told['verdict']}: {told['says']}" if told else None


@dataclass(frozen=True)
class _Chosen:
    """The values to merge into, and for the proof those that the adapter ``seen`` and the 16-bit base, where they are there."""

    values: Values
    fingerprint: str | None
    onto: str = "trained"
    seen: Values | None = None
    original: Path | None = None
    notes: tuple[str, ...] = ()


def _choose_base(adapters: Sequence[Path], source: Path, base: Path | None, onto: str | None) -> _Chosen:
    """Which values to merge into, where the adapter was trained on quantised ones.

    Raises:
        RequestError: ``onto`` is unknown, or what it asks for is not there.
    """
    if onto not in (None, *ONTO):
        raise RequestError(f"there is no {onto!r} to merge onto.", code="onto", where="--onto", remedy=f"Take one of {', '.join(ONTO)}.")  # fmt: skip
    adapter, how = adapters[0], _quantised_alike(adapters, onto)
    if how is not None and not (base is not None and _is_quantised(base)):
        return _on_the_fly(how, adapter, source, base, onto or "trained")
    if onto is None or (base is not None and _is_quantised(base)):
        named, expected = (base, None) if base is not None else base_of(adapter, source)
        if onto == "original":
            raise _no_original(named)
        return _Chosen(Values(named), expected, seen=Values(named) if _is_quantised(named) else None)
    seen, expected = base_of(adapter, source)
    if not _is_quantised(seen):
        raise RequestError(
            f"the base this adapter names, {seen}, is not quantised, so there are no two values to choose from.",
            code="onto", where="--onto", remedy="Leave --onto out; --base gives the folder to merge into.",
        )  # fmt: skip
    if onto == "trained":
        return _Chosen(Values(seen), expected, seen=Values(seen), original=base)
    if base is None:
        raise _no_original(seen)
    return _Chosen(Values(base), None, "original", seen=Values(seen), original=base)


def _quantised_alike(adapters: Sequence[Path], onto: str | None) -> Quantised | None:
    """How the base was quantised as it was read for training; None where it wasn't.

    Raises:
        RequestError: it was for one adapter otherwise than for another.
    """
    found = [quantised_in_training(adapter) for adapter in adapters]
    if onto != "original" and any(each != found[0] for each in found):
        raise RequestError(
            "these adapters were trained on a base that was quantised in different ways, so they saw different values.",
            code="onto",
            where=", ".join(str(adapter) for adapter in adapters),
            remedy="Merge each alone, or all into the weights before quantising with --onto original.",
        )
    return next((each for each in found if each is not None), None)


def _on_the_fly(how: Quantised, adapter: Path, source: Path, base: Path | None, onto: str) -> _Chosen:
    """The values of a base whose files are 16-bit, and which was quantised as it was read."""
    named, expected = (base, None) if base is not None else base_of(adapter, source)
    seen = Values(named, how)
    values = seen if onto == "trained" else Values(named)
    what = "the values that it had there" if onto == "trained" else "the weights as they were before quantising"
    note = f"the adapter was trained on its base in {how.form}, and is merged into {what}"
    return _Chosen(values, expected, onto, seen, named, (note,))


def _is_quantised(folder: Path) -> bool:
    return bool((folder / "config.json").is_file() and folders.read_config(folder).get("quantization_config"))


def _no_original(quantised: Path) -> RequestError:
    return RequestError(
        f"the original weights are asked for, and {quantised} holds quantised ones.",
        code="onto",
        where="--onto",
        remedy="Give the folder of the 16-bit weights with --base.",
    )


def weights_folder(path: Path) -> Path:
    """The folder of weights that an artefact means: a run's final one, else its newest whole checkpoint's.

    Raises:
        RequestError: there is none.
    """
    found = artifacts.identify(path)
    if found.kind == "run":
        newest = None if (path / "final").is_dir() else newest_whole(path, lambda text: None)
        if newest is None and not (path / "final").is_dir():
            raise RequestError("this run has saved nothing yet.", code="nothing-saved", where=str(path), remedy="Train first: luthier resume on this folder.")  # fmt: skip
        return weights_folder(newest[0].path if newest else path / "final")
    if found.kind == "checkpoint":
        manifests.raise_problems(path, found.faults)
        return path / ("adapter" if (path / "adapter").is_dir() else "model")
    if found.kind in ("adapter", "base", "merged"):
        manifests.raise_problems(path, found.faults)
        return path
    raise RequestError(f"this is of kind {found.kind}, which this version cannot export.", code="kind", where=str(path))


def base_of(adapter: Path, source: Path) -> tuple[Path, str | None]:
    """The folder of the base that an adapter names, and the fingerprint it must have where that is known.

    Raises:
        RequestError: it is not on this machine.
    """
    from huggingface_hub import try_to_load_from_cache

    home = adapter if (adapter / manifests.NAME).is_file() else adapter.parent
    facts: dict[str, Any] = manifests.read(home).facts if (home / manifests.NAME).is_file() else {}
    named = artifacts.identify(adapter).base or {}
    name = str((facts.get("base") or {}).get("name") or named.get("name") or "")
    expected = (facts.get("base") or {}).get("fingerprint")
    run = next((p for p in adapter.resolve().parents[:4] if (p / "run.yaml").is_file()), None)
    if name and Path(name).is_dir():
        return Path(name), expected
    if run is not None and (run / "base").is_dir():
        return run / "base", None
    cached = try_to_load_from_cache(name, "config.json", revision=named.get("revision")) if name.count("/") == 1 else None  # fmt: skip
    if isinstance(cached, str):
        return Path(cached).parent, expected
    raise RequestError(
        f"the base this adapter names, {name or 'none'}, is not there.",
        code="base-missing",
        where=str(source),
        remedy="Give its folder with --base.",
    )


def _copy(
    folder: Path, out: Path, dtype: str | None, shard_bytes: int, prove: bool, *, adapter: bool
) -> list[str]:  # fmt: skip
    """A model's or an adapter's folder again: other shards, another dtype, safetensors instead of pickles."""
    folders.check_target(out, [folder])
    said: list[str] = []
    stem = "adapter_model" if adapter else "model"
    config = None if adapter else folders.read_config(folder)
    word = folders.word_of(dtype)
    if word is None and config is not None and config.get("quantization_config"):
        word = folders.word_in(config)
    home = folder if (folder / manifests.NAME).is_file() else folder.parent
    told = manifests.read(home) if (home / manifests.NAME).is_file() else None
    with open_source(folder, stem) as files:
        source = files if config is None else dequantised(files, config)
        outputs = [_as_is(source, name, word) for name in source.specs]
        small = folders.companions([folder])
        if config is None:
            small["adapter_config.json"] = (folder / "adapter_config.json").read_bytes()
        else:
            config = folders.changed_config(config, outputs)
            small["config.json"] = folders.as_json(config)
        options = ["adapter" if adapter else "transformers", dtype, shard_bytes]
        with unfinished(out, [folder], options, said.append) as (partial, journal):
            kind = "adapter" if adapter else "merged" if told and told.kind == "merged" else "model"
            written = write_stream(partial, outputs, small, stem=stem, kind=kind, metadata={"format": "pt"}, shard_bytes=WHOLE if adapter else shard_bytes, journal=journal)  # fmt: skip
            if prove:
                said.append(check_written(partial, written.manifest))
            proof = prove_copy(folder, word) if source is files else prove_dequantised(folder, word)
            late = {"proof.json": proof(partial)} if prove else {}
            folders.publish_folder(partial, out, written.manifest, _facts(told, folder, kind), config=config, late=late)
    return said


def _as_is(source: Source, name: str, word: str | None) -> Output:
    spec = source.specs[name]
    return Output(replace(spec, dtype=word) if word and spec.dtype in FLOATS else spec, source, name)


def _facts(told: Manifest | None, folder: Path, kind: str) -> dict[str, Any]:
    """What the copy says of its origin: a merged model stays one, so its parents stay its parents."""
    if told is None:
        return {"parents": [{"kind": kind, "name": str(folder.resolve())}]}
    parents = told.facts.get("parents", []) if kind == "merged" else [{"kind": kind, "name": str(folder.resolve()), "fingerprint": told.facts.get("fingerprint")}]  # fmt: skip
    return {"parents": parents, "base": told.facts.get("base"), "step": told.facts.get("step")}
