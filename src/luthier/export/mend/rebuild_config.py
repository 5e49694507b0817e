"""An adapter's lost ``adapter_config.json``, from the names and shapes of its tensors.

Names tell the method and the layers, shapes the ranks. What no tensor tells (LoRA's alpha, and whether the rank-stabilised
scaling was used) is asked for. Dropout has no effect on a saved adapter. Where shapes don't determine a method's
config, the method is named and refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from luthier.artifacts.names import ADAPTER_PARTS, PEFT
from luthier.artifacts.tensorfile import TensorSpec
from luthier.errors import RequestError

_LORA_ENDS = {
    "lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1,
    "lora_magnitude_vector": None, "lora_B.bias": None,
}  # fmt: skip


def rebuild(
    specs: Mapping[str, TensorSpec],
    *,
    base: str | None,
    base_shapes: Mapping[str, tuple[int, ...]] | None,
    alpha: float | None,
    rslora: bool,
    where: str,
) -> dict[str, Any]:
    """The config of an adapter with these tensors (names as peft writes them).

    Args:
        base: what the config calls the base.
        base_shapes: shapes by name in the base's files, where it is at hand: names of layers are then shortened.

    Raises:
        RequestError: something must be given (the flags are named), or the method can't be told from shapes.
    """
    parts = {part for name in specs for part in name.split(".") if part.startswith(ADAPTER_PARTS)}
    kinds = {part.partition("_")[0] for part in parts}
    if kinds == {"ia3"}:
        _ask({"--base BASE": base is None}, where)
        made = _ia3(specs)
    elif kinds == {"lora"}:
        _ask({"--base BASE": base is None, "--alpha A (and --rslora if it was used)": alpha is None}, where)
        assert alpha is not None
        made = _lora(specs, alpha, rslora, where)
    else:
        found = ", ".join(sorted(parts)) or "none that peft writes"
        raise _refused(f"its adapter_config.json is missing, and the adapter's tensors ({found}) don't determine one.", where)  # fmt: skip
    copied = next((name for name in specs if ".base_layer." in name), None)
    if copied is not None:
        raise _refused(f"{copied} is no part of the adapter and not the base's either, so the vocabulary or the base is another.", where)  # fmt: skip
    saved = sorted({name.removeprefix(PEFT).rpartition(".")[0] for name in specs if not _own(name)})
    for module in saved:
        shape = specs[f"{PEFT}{module}.weight"].shape if f"{PEFT}{module}.weight" in specs else None
        expected = (base_shapes or {}).get(f"{module}.weight")
        if shape is not None and expected is not None and shape != expected:
            raise _refused(f"{module} has {shape[0]} rows and the base's {expected[0]}: the vocabulary was resized, which no shape explains.", where)  # fmt: skip
    if base_shapes is not None:
        made["target_modules"] = shortest(made["target_modules"], base_shapes)
        if "feedforward_modules" in made:
            made["feedforward_modules"] = shortest(made["feedforward_modules"], base_shapes)
    return {
        **made,
        "base_model_name_or_path": base,
        "modules_to_save": saved or None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }


def _ask(missing: Mapping[str, bool], where: str) -> None:
    flags = [flag for flag, needed in missing.items() if needed]
    if flags:
        raise RequestError(f"its adapter_config.json is missing, and its tensors don't say everything. Needed: {', '.join(flags)}.", code="cannot-know", where=where, remedy=f"Give {' and '.join(flags)}.")  # fmt: skip


def _refused(why: str, where: str) -> RequestError:
    return RequestError(why, code="not-mendable", where=where, remedy="Write adapter_config.json by hand from the training's settings, or take it from another checkpoint of the same run.")  # fmt: skip


def _own(name: str) -> bool:
    return any(part.startswith(ADAPTER_PARTS) for part in name.split("."))


def _lora(specs: Mapping[str, TensorSpec], alpha: float, rslora: bool, where: str) -> dict[str, Any]:
    ranks: dict[str, int] = {}
    seen: dict[str, set[str]] = {}
    for name, spec in specs.items():
        if not _own(name):
            continue
        end = next((end for end in _LORA_ENDS if name.endswith(f".{end}")), None)
        if end is None:
            raise _refused(f"its adapter_config.json is missing, and what {name} was is in no shape.", where)
        module = name.removeprefix(PEFT).removesuffix(f".{end}")
        if module.endswith(".base_layer") or module.rpartition(".")[2] == "experts":
            raise _refused(f"its adapter_config.json is missing, and {module} is the adapter of fused experts, whose rank and order no shape tells.", where)  # fmt: skip
        seen.setdefault(module, set()).add(end)
        axis = _LORA_ENDS[end]
        if axis is not None:
            rank = spec.shape[axis] if len(spec.shape) >= 2 else 0
            if rank == 0 or ranks.setdefault(module, rank) != rank:
                raise _refused(f"the tensors of {module} are empty or of different ranks, such as a shard of several would be.", where)  # fmt: skip
    for module, ends in seen.items():
        if not ({"lora_A.weight", "lora_B.weight"} <= ends or {"lora_embedding_A", "lora_embedding_B"} <= ends):
            raise _refused(f"{module} has only {', '.join(sorted(ends))}; half an adapter is none.", where)
    dora = [module for module, ends in seen.items() if "lora_magnitude_vector" in ends]
    biased = [module for module, ends in seen.items() if "lora_B.bias" in ends]
    for some in (dora, biased):
        if some and len(some) != len(seen):
            raise _refused(f"{len(some)} of {len(seen)} layers have a tensor that all or none should have.", where)
    r, pattern = common_rank(ranks)
    return {
        "peft_type": "LORA", "r": r, "rank_pattern": pattern, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "alpha_pattern": {}, "lora_dropout": 0.0, "bias": "none", "use_rslora": rslora, "use_dora": bool(dora),
        "lora_bias": bool(biased), "target_modules": sorted(ranks),
    }  # fmt: skip


def _ia3(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """IA3 scales inputs of feed-forward layers (a row) and outputs of others (a column)."""
    shapes = {n.removeprefix(PEFT).removesuffix(".ia3_l"): s.shape for n, s in specs.items() if n.endswith(".ia3_l")}
    fed = sorted(module for module, shape in shapes.items() if shape[0] == 1)
    return {"peft_type": "IA3", "target_modules": sorted(shapes), "feedforward_modules": fed, "init_ia3_weights": True}


def common_rank(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The rank most layers have, and the layers that have another."""
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))
    return r, {module: rank for module, rank in sorted(ranks.items()) if rank != r}


def shortest(modules: Collection[str], base: Collection[str]) -> list[str]:
    """Modules by their last name where every module of the base that is called so is among them."""
    every = {name.rpartition(".")[0] for name in base}
    tails = {module.rpartition(".")[2] for module in modules}
    whole = {
        tail for tail in tails if all(name in modules for name in every if name == tail or name.endswith(f".{tail}"))
    }
    return sorted({tail if (tail := module.rpartition(".")[2]) in whole else module for module in modules})
