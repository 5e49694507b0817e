"""Which of peft's methods can be merged, and how: decided for each of them, since a wrong guess would go unnoticed.

A method that a newer peft adds is in none of these and is refused until somebody decided on it.
"""

from __future__ import annotations

FORMULA = ("LORA", "TRAINABLE_TOKENS")  # computed by this package, see lowrank
# Merged by peft's own layer, one layer at a time (see peft_layers).
THROUGH_PEFT = (
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
_PROMPTS = "puts trained vectors before the text and changes no weight"
NO_WEIGHTS = {  # methods whose effect is no change of weights, and what they do instead
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "ADAPTION_PROMPT": "adds an attention of its own to the layers",
    "LILY": "routes every token through experts of its own",
    "POLY": "mixes its parts by the task of each sample",
    "SHADOW": "runs a second model beside the layers",
    "XLORA": "mixes its adapters anew for every token",
}
IN_MEMORY = {"FROD": "computes its matrices from all layers' weights at once"}  # peft can merge them, a stream cannot


def why_not(method: str) -> tuple[str, str] | None:
    """Why a method (peft's word for it) cannot be merged in a stream, and what to do instead; None if it can."""
    if method in FORMULA or method in THROUGH_PEFT:
        return None
    if method in NO_WEIGHTS:
        return f"{method} cannot be merged: it {NO_WEIGHTS[method]}", "Serve the adapter on its base with peft."
    if method in IN_MEMORY:
        return f"{method} cannot be merged in a stream: it {IN_MEMORY[method]}", "Merge it in memory with peft's merge_and_unload."  # fmt: skip
    return (
        f"adapters of type {method or 'unknown'} are not known here, so how they merge is not either",
        "Serve the adapter on its base, or merge it in memory with peft's merge_and_unload.",
    )
