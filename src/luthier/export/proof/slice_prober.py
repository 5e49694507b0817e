"""Compares a merged or copied model with what it was made from, tensor by tensor, on slices. Run as a script, in a process of its own.

It must not import luthier: peft's own layers say what a merged weight is. For models that no memory of this machine holds.
The request is JSON in the file named by the first argument:

    {"base": folder, "adapter": folder or null, "merged": folder, "rows": 16, "threads": 2, "out": "answer.json"}

Of each tensor four blocks of rows are read: the first, the last and two drawn at random. A weight under LoRA becomes an
``nn.Linear`` of those rows at its own name, in which peft puts its layer by the adapter's config, is given the adapter's
tensors and merges in fp32. What comes of it, rounded to the file's dtype, is compared with the merged file: an element may
be one rounding off where fp32 sums in another order fall on the other side. All other tensors must be the source's bits.
"""

import json
import random
import sys
from pathlib import Path

PREFIX = "base_model.model."
MOST = 1 << 22  # elements a block


def main(request_path):
    request = json.loads(Path(request_path).read_text())
    import torch

    torch.set_num_threads(request["threads"])
    base, merged = Folder(request["base"]), Folder(request["merged"])
    adapter = Adapter(request["adapter"]) if request["adapter"] else None
    answer = {
        "layers": {},
        "equal": 0,
        "different": [],
        "not_covered": [],
        "elements": 0,
        "luthier": "luthier" in sys.modules,
    }
    for name in sorted(merged.files):
        module, _, leaf = name.rpartition(".")
        saved = adapter.saved.pop(name, None) if adapter else None
        lora = adapter.layers.pop(module, None) if adapter and leaf == "weight" else None
        if lora is not None and (saved is not None or lora.keys() - KNOWN or name not in base.files):
            answer["not_covered"].append(name)
            continue
        if saved is None and name not in base.files:
            answer["not_covered"].append(name)
            continue
        shape = merged.slice(name).get_shape()
        source = base.slice(name) if saved is None else adapter.slice(saved)
        if source.get_shape() != shape or (lora is not None and len(shape) != 2):
            answer["not_covered"].append(name)
            continue
        for start, stop in blocks(name, shape, request["rows"]):
            found = rows_of(merged.slice(name), start, stop, shape)
            was = rows_of(source, start, stop, shape)
            answer["elements"] += found.numel()
            if lora is None:
                if torch.equal(was.to(found.dtype), found):
                    answer["equal"] += 1
                elif name not in answer["different"]:
                    answer["different"].append(name)
                continue
            wanted = merged_by_peft(adapter, module, lora, was, start, stop, shape)
            note_layer(
                answer["layers"].setdefault(module, {"elements": 0, "changed": 0, "off": 0, "farthest": 0.0}),
                was,
                wanted,
                found,
            )
    rest = [] if adapter is None else [*adapter.layers, *adapter.saved]
    answer["not_covered"] += [*rest, *sorted(base.files.keys() - merged.files.keys())]
    Path(request["out"]).write_text(json.dumps(answer))


class Folder:
    """The safetensors of a folder by name."""

    def __init__(self, folder):
        from safetensors import safe_open

        self.files = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            file = safe_open(path, "pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def slice(self, name):
        return self.files[name].get_slice(name)


KNOWN = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}


class Adapter(Folder):
    """A LoRA: ``layers`` (module: its tensors' names by their last parts), and ``saved``, what replaces a tensor whole."""

    def __init__(self, folder):
        super().__init__(folder)
        from peft import PeftConfig

        self.config = PeftConfig.from_pretrained(folder)
        self.layers, self.saved = {}, {}
        for name in self.files:
            plain = name.removeprefix(PREFIX)
            module, mark, part = plain.partition(".lora_")
            if mark:
                self.layers.setdefault(module, {})["lora_" + part] = name
            else:
                self.saved[plain.replace(".base_layer.", ".")] = name


def blocks(name, shape, rows):
    """Stretches of rows of a tensor; all of it where it is small."""
    height = shape[0] if shape else 1
    width = 1
    for size in shape[1:]:
        width *= size
    rows = max(1, min(rows, MOST // max(1, width)))
    if height <= 4 * rows or len(shape) < 2:
        return [(0, height)]
    drawn = random.Random(name)  # the same rows each time, other ones in each tensor
    starts = {0, height - rows, *(drawn.randrange(height - rows) for _ in range(2))}
    return [(start, start + rows) for start in sorted(starts)]


def rows_of(part, start, stop, shape):
    return part[start:stop] if shape else part[...]


def merged_by_peft(adapter, module, lora, was, start, stop, shape):
    """What peft makes of some rows of a weight, in fp32."""
    import copy

    import torch
    from peft import inject_adapter_in_model

    config = copy.deepcopy(adapter.config)
    config.inference_mode, config.init_lora_weights = False, False
    config.modules_to_save = config.trainable_token_indices = config.target_parameters = config.layers_to_transform = (
        None
    )
    config.bias = "none"
    linear = torch.nn.Linear(shape[1], stop - start, bias=False)
    linear.weight.data = was.float()
    root = torch.nn.Module()
    place = root
    *outer, last = module.split(".")
    for word in outer:
        place.add_module(word, torch.nn.Module())
        place = getattr(place, word)
    place.add_module(last, linear)
    inject_adapter_in_model(config, root)
    layer = root.get_submodule(module)
    with torch.no_grad():
        a, b = (adapter.slice(lora[f"lora_{side}.weight"]) for side in "AB")
        layer.lora_A["default"].weight.copy_(a[:, :])
        layer.lora_B["default"].weight.copy_(b[start:stop])
        if "lora_magnitude_vector" in lora:
            layer.lora_magnitude_vector["default"].weight.copy_(
                adapter.slice(lora["lora_magnitude_vector"])[start:stop]
            )
        layer.merge()
    return layer.get_base_layer().weight.data


def note_layer(told, was, wanted, found):
    """Count elements that merging changed, and those that are not what peft's rounds to; how many roundings off the farthest is."""
    import torch

    told["elements"] += found.numel()
    told["changed"] += int((was.to(found.dtype) != found).sum())
    off = wanted.to(found.dtype) != found
    told["off"] += int(off.sum())
    if off.any() or not torch.isfinite(found).all():
        unit = torch.finfo(found.dtype).eps * wanted.abs() + torch.finfo(torch.float32).eps * was.float().abs().max()
        steps = (wanted - found.float()).abs() / unit.clamp_min(torch.finfo(torch.float32).tiny)
        told["farthest"] = max(told["farthest"], float(torch.nan_to_num(steps, nan=float("inf")).max()))


if __name__ == "__main__":
    main(sys.argv[1])
