"""Which tensor of the files an adapter's layer means, where names alone don't tell.

An adapter speaks of modules in memory, files have names of their own: transformers converts between them (experts are
fused in memory, prefixes come and go), ties tensors under one name, and a parameter that an adapter targets directly is
known by its order in its module only. All this is read off a model without storage, in a process of its own, since
it takes transformers: the stream itself stays without. Run as a script with a folder, it prints that as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.artifacts.fingerprint import remembered
from luthier.errors import ArtifactError


@dataclass(frozen=True)
class Stretch:
    """A file's tensor that is ``count`` consecutive elements, from ``start`` on, of a tensor in memory."""

    file: str
    start: int
    count: int


@dataclass(frozen=True)
class Naming:
    """How memory's names lead to files'.

    Attributes:
        stored: the file tensors that make up a tensor in memory; None for one whose conversion is no stretch.
        shapes: of tensors in memory.
        tied: follower → the tensor whose storage it shares.
        parameters: a module's own parameters in order.
        transposed: modules whose experts are held (experts, in, out).
    """

    stored: Mapping[str, list[Stretch] | None]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, list[str]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()


def read_naming(folder: Path) -> Naming:
    """The names of a transformers folder's model, asked of transformers in a process of its own.

    Raises:
        ArtifactError: transformers does not know the model; the text carries its error.
    """
    # A function of the config and of transformers alone, and asking costs another interpreter's imports.
    told = json.loads(
        remembered([folder / "config.json"], lambda: _ask(folder), facts=["naming", version("transformers")])
    )
    return Naming(
        {name: None if found is None else [Stretch(*each) for each in found] for name, found in told["stored"].items()},
        {name: tuple(shape) for name, shape in told["shapes"].items()},
        told["tied"],
        told["parameters"],
        frozenset(told["transposed"]),
    )


def _ask(folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", "luthier.export.naming", str(folder)], capture_output=True, text=True)
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        raise ArtifactError(
            f"transformers cannot build this model from its config: {last[0] if last else done.returncode}",
            code="unknown-model",
            where=str(folder),
            remedy="Merging needs the names of its layers; install the transformers version that knows it.",
        )
    return done.stdout.strip().splitlines()[-1]


def empty_model(folder: Path) -> Any:
    """A transformers folder's model without storage."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    with torch.device("meta"):
        return kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _describe(folder: Path) -> dict[str, Any]:
    from luthier.checkpoint.layout import model_layout

    model = empty_model(folder)
    state = model.state_dict(keep_vars=True)
    layout = model_layout(model)
    stored: dict[str, list[tuple[str, int, int]] | None] = {}
    for item in layout.stored:
        if item.group is not None or item.runs is None:
            continue
        found = stored.setdefault(item.source, [])
        if found is None or len(item.runs.starts) != 1:
            stored[item.source] = None
        else:
            found.append((item.spec.name, int(item.runs.starts[0]), item.runs.length))
    for group in layout.groups:
        stored |= dict.fromkeys(group)
    modules = dict(model.named_modules())
    return {
        "stored": stored,
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "tied": dict(getattr(model, "all_tied_weights_keys", None) or {}),
        "parameters": {
            name: [key for key, _ in module.named_parameters(recurse=False)] for name, module in modules.items()
        },
        "transposed": [name for name, module in modules.items() if getattr(module, "is_transposed", False)],
    }


if __name__ == "__main__":
    print(json.dumps(_describe(Path(sys.argv[1]))))
