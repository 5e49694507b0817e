"""Names of tensors as other tools left them, brought to the one form that transformers and peft write.

Wrappers leave their own parts in names (torch.compile, FSDP, activation checkpointing, data parallelism), a whole peft
model's state dict carries the adapter's name inside each of its tensors, and wrapping a wrapped model doubles a prefix.
None of this says anything about the weights. All of it is known here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from luthier.errors import ArtifactError

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
LEADING = "module"  # data parallelism and DeepSpeed put it first; elsewhere a module may really be called so
PEFT = "base_model.model."
# Parts of names that begin an adapter's own tensor, by method of peft.
ADAPTER_PARTS = (
    "lora_", "hada_", "lokr_", "ia3_", "oft_", "boft_", "vera_", "randlora_", "fourierft_", "vblora_", "hra_", "bone_",
    "miss_", "shira_", "c3a_", "waveft_", "road_", "delora_", "gralora_", "osf_", "ln_tuning_", "trainable_tokens_", "token_adapter",
    "adamss_", "beft_", "deft_", "glora_", "hira_", "lily_", "peanut_", "psoft_", "pvera_", "supertuning_", "tinylora_", "unilora_",
)  # fmt: skip
_LEAVES = ("weight", "bias", "trainable_tokens_delta")
# What may follow an adapter's own part in a file; anything else there is the adapter's name in memory.
_INNER = (*_LEAVES, "S_low", "U_low", "V_low", "X", "Xd", "Xu", "zeros", "vector_a", "vector_b", "module_logits")
_NUMBERED = ("tinylora_v", "adamss_A", "adamss_B")  # lists of tensors: a number follows
# Tensors that belong to no layer: peft writes them to files without its prefix, or with another.
_SHARED = (
    "prompt_embeddings", "prompt_encoder.", "prefix_task_", "base_model.vera_", "base_model.randlora_", "base_model.vblora_",
    "base_model.pvera_", "base_model.tinylora_", "base_model.unilora_", "base_model.frod_", "base_model.shadow_",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterName:
    """A tensor of an adapter: ``name`` as peft writes it to files, ``adapter`` what it was called in memory, if the name said."""

    name: str
    adapter: str | None = None


def unwrapped(name: str) -> str:
    """The name without the parts that wrappers put into it: ``module._orig_mod.model.norm.weight`` → ``model.norm.weight``."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == LEADING:
        parts.pop(0)
    return ".".join(parts)


def of_model(name: str) -> str:
    """The name that transformers writes to a file for a model's tensor: ``base_model.model.model.norm.weight`` → ``model.norm.weight``."""
    name = unwrapped(name)
    while name.startswith(PEFT):
        name = unwrapped(name.removeprefix(PEFT))
    return name


def of_layer(name: str) -> str:
    """A base layer's own name, whatever adapters lie around it: ``model.x.q_proj.base_layer`` → ``model.x.q_proj``."""
    parts = [part for part in of_model(name).split(".") if part != "base_layer"]
    around = ("token_adapter", "original_module", "modules_to_save")
    end = next((index for index, part in enumerate(parts) if part in around), len(parts))
    return ".".join(parts[:end])


def of_adapter(name: str) -> AdapterName:
    """The name that peft writes to a file for an adapter's tensor, whatever it was saved as.

    ``module.base_model.model.base_model.model.x.lora_A.default.weight`` → ``base_model.model.x.lora_A.weight``, ``default``.
    """
    parts = of_model(name).split(".")
    own = next((index for index, part in enumerate(parts) if part.startswith(ADAPTER_PARTS)), None)
    if own is not None and parts[own] == "token_adapter" and parts[own + 1 : own + 2] == ["trainable_tokens_delta"]:
        own += 1
    inner = None
    if own is not None and len(parts) > own + 1 and not _is_inner(parts[own], parts[own + 1]):
        inner = parts.pop(own + 1)
        if parts[own] == "lora_magnitude_vector" and parts[-1] == "weight":
            parts.pop()  # DoRA's vector is a module in memory and a bare tensor in files
    elif "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        named = len(parts) > at + 1 and parts[at + 1] not in _LEAVES
        inner = parts[at + 1] if named else None
        del parts[at : at + 1 + named]
    plain = ".".join(parts)
    return AdapterName(plain if plain.startswith(_SHARED) else PEFT + plain, inner)


def _is_inner(own: str, following: str) -> bool:
    return following in _INNER or (own in _NUMBERED and following.isdigit())


def is_adapters(name: str) -> bool:
    """Whether a tensor belongs to an adapter rather than to a model."""
    return name.startswith(_SHARED) or any(
        part.startswith(ADAPTER_PARTS) or part == "modules_to_save" for part in name.split(".")
    )


def copies(names: Iterable[str]) -> set[str]:
    """Tensors that an adapter's file holds a second time: peft writes a module saved whole so where the vocabulary was resized.

    ``x.lm_head.modules_to_save.weight`` and the frozen ``x.lm_head.original_module.weight`` lie beside ``x.lm_head.weight``.
    """
    names = set(names)
    found = set()
    for name in names:
        for part in (".modules_to_save.", ".original_module."):
            before, _, leaf = name.rpartition(part)
            if before and leaf in _LEAVES and f"{before}.{leaf}" in names:
                found.add(name)
    return found


def renamed(names: Iterable[str], *, adapter: bool, where: str) -> dict[str, str]:
    """Every name with its canonical one; an adapter's copies (see `copies`) are left out.

    Raises:
        ArtifactError: two tensors would get the same name, so what wrapped them cannot be told.
    """
    result: dict[str, str] = {}
    taken: dict[str, str] = {}
    names = list(names)
    second = copies(names) if adapter else set()
    for name in names:
        if name in second:
            continue
        plain = of_adapter(name).name if adapter else of_model(name)
        if plain in taken:
            raise ArtifactError(
                f"{taken[plain]} and {name} both stand for {plain}.",
                code="names-clash",
                where=where,
                remedy="Two models, or two adapters, lie in one file; save each into a folder of its own.",
            )
        taken[plain] = name
        result[name] = plain
    return result
