"""Merging: a base and its adapters become one transformers folder, in a stream.

``W + s·B·A`` in fp32, rounded once to the target's dtype. The merged folder is another artefact beside the adapter and
never takes its place; its manifest names the base and the adapters it was made from, by fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier.artifacts.manifest import Manifest
from luthier.artifacts.tensorfile import DEFAULT_SHARD
from luthier.errors import ArtifactError, RequestError
from luthier.export import exported_folder as folders
from luthier.export.merged.adapter import Adapter, open_adapters
from luthier.export.merged.as_trained import Quantised, as_trained, in_the_files_dtypes
from luthier.export.merged.combine import Combination
from luthier.export.merged.dequantise import Dequantised, dequantised
from luthier.export.merged.plan import plan_merge
from luthier.export.read_back import check_written
from luthier.export.source import open_source
from luthier.export.stream import write_stream
from luthier.export.unfinished import unfinished


def merge_folders(
    base: Path,
    adapter: Path | Sequence[Path],
    out: Path,
    *,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
    combination: Combination | None = None,
    quantised: Quantised | None = None,
    shard_bytes: int = DEFAULT_SHARD,
    expected_base: str | None = None,
    name: str | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    facts: Mapping[str, Any] | None = None,
    prove: Callable[[Path], bytes] | None = None,
    check: Callable[[Path, Manifest], str] | None = check_written,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Merge one adapter, or a weighted sum of several, into its base and publish the folder ``out``.

    Args:
        base: a transformers folder; one that bitsandbytes quantised is read as the values its codes stand for.
        adapter: a PEFT folder, or several.
        dtype: bf16, fp16 or fp32; the base's own if None, of a quantised one what its config says.
        weights: one factor an adapter; 1 each if None.
        combination: how several adapters become one change; their weighted sum if None.
        quantised: how the base was quantised in training, to merge into the values that it had there; into its own if None.
        expected_base: the fingerprint that the base must have; any if None.
        name: what the parents call the base, where that isn't its path (a hub id).
        tokenizer: the tokenizer's files, where neither the adapter's nor the base's is wanted.
        facts: what the manifest says in place of what is found, such as ``parents``.
        prove: is given the folder before it has its name, returns ``proof.json``, and raises where the proof fails.
        check: compares what is on the device with the digests before the folder gets its name, and returns a sentence.
        report: is given sentences to be said.

    Raises:
        RequestError: ``out`` exists or lies in a source, the adapter is merged into this base already, or is of a method
            that cannot be merged.
        ArtifactError: the adapter does not fit the base, a file is broken, or the proof failed.
    """
    several = [adapter] if isinstance(adapter, Path) else list(adapter)
    folders.check_target(out, [base, *several])
    config = folders.read_config(base)
    with open_source(base) as files, open_adapters(several, list(weights or [1.0] * len(several))) as adapters:
        source = dequantised(files, config) if quantised is None else as_trained(files, quantised)
        word = folders.word_of(dtype) or (folders.word_in(config) if isinstance(source, Dequantised) else None)
        before = folders.parents_of(base)
        _refuse_twice(before, adapters, base)
        plan = plan_merge(source, adapters, word, combination)
        if plan.vocabulary is not None and config.get("model_type") == "mllama":
            raise RequestError(f"the adapter was trained with a vocabulary grown to {plan.vocabulary} rows, and no config says that of Llama's vision model: its embeddings always have 8 rows more than its head, so transformers itself cannot open what it saves of such a model.", code="cannot-merge", where=str(several[0]), remedy="Use the adapter on its base, resized as it was in training.")  # fmt: skip
        outputs = plan.outputs if word else in_the_files_dtypes(plan.outputs, source)
        config = folders.changed_config(config, outputs, untied=plan.untied, vocabulary=plan.vocabulary)
        small = folders.companions([base, *several]) if tokenizer is None else folders.companions([base]) | dict(tokenizer)  # fmt: skip
        small["config.json"] = folders.as_json(config)
        options = [
            "merged",
            dtype,
            weights,
            asdict(combination) if combination else None,
            shard_bytes,
            asdict(quantised) if quantised else None,
        ]
        with unfinished(out, [base, *several], options, report) as (partial, journal):
            written = write_stream(
                partial, outputs, small, stem="model", kind="merged", metadata={"format": "pt"},
                shard_bytes=shard_bytes, witness=files, journal=journal,
            )  # fmt: skip
            fingerprint = folders.fingerprint_of_base(base, files, written.source_digests)
            if expected_base and fingerprint and fingerprint != expected_base:
                raise ArtifactError(
                    f"the base at {base} is not the one this adapter was trained on: its weights differ.",
                    code="other-base",
                    where=str(several[0]),
                    remedy="Give the right one with --base; giving any base by hand insists on it.",
                )
            parent: dict[str, Any] = {"kind": "merged" if before else "base", "name": name or str(base.resolve())}
            parent |= {"fingerprint": fingerprint} | ({"parents": before} if before else {})
            if quantised is not None:
                parent["quantisation"] = {"precision": quantised.form, "kept": list(quantised.kept)}
            if combination is not None:
                facts = {"combined": asdict(combination), **(facts or {})}
            told = {"parents": [parent, *(_parent(each) for each in adapters)], "base": None, **(facts or {})}
            if check is not None:
                report(check(partial, written.manifest))
            late = {"proof.json": prove(partial)} if prove else {}
            folders.publish_folder(partial, out, written.manifest, told, config=config, late=late)
    return out


def _parent(adapter: Adapter) -> dict[str, Any]:
    told = {"kind": "adapter", "name": str(adapter.folder.resolve()), "fingerprint": adapter.fingerprint}
    return told if adapter.weight == 1.0 else {**told, "weight": adapter.weight}


def _refuse_twice(parents: list[dict[str, Any]], adapters: Sequence[Adapter], base: Path) -> None:
    inside = set()
    left = list(parents)
    while left:
        parent = left.pop()
        inside.add(parent.get("fingerprint"))
        left += parent.get("parents", [])
    for adapter in adapters:
        if adapter.fingerprint in inside:
            raise ArtifactError(
                "this adapter is merged into that base already; merging it again would add it twice.",
                code="merged-already",
                where=str(base),
                remedy="Use the folder as it is, or give the base that the adapter was trained on with --base.",
            )
