"""What a GGUF's weights should answer, computed by plain transformers. Run as a script, in a process of its own.

It must not import luthier. The model is opened as its folder is, in fp32; then every weight is replaced by what the gguf
package reads from the file; then the inputs of every linear layer are rounded as llama.cpp rounds them for weights of
that kind. So three answers stand side by side: the original's, the file's, and how far llama.cpp's rounding may move the
file's. The request is JSON in the file named by the first argument:

    {"folder": …, "file": …, "ids": [[…], …], "greedy": [[ids], count] or null, "threads": 2, "out": "logits.safetensors",
     "weights": {"model.norm.weight": ["output_norm.weight", heads, plus], …}, "opens": bool}

``heads`` and ``plus`` say how the file's form differs: rows of that many heads are interleaved, and ``plus`` was added.
It writes ``original0``, ``file0``, ``rounded0`` … and, beside them as JSON, the greedy answer with the lead of each token over
the next likely one, and the largest relative error of a weight by kind. With ``opens``, transformers opens the file by itself
as well (``opened0`` …, or why it could not).
"""

import json
import sys
from pathlib import Path


def main(request_path):
    request = json.loads(Path(request_path).read_text())
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(request["folder"], local_files_only=True, dtype=torch.float32).eval()
    tensors = answers(model, request["ids"], "original")
    told = {"greedy": continued(model, *request["greedy"]) if request["greedy"] else []}
    file = Path(request["file"])
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    told["errors"], told["unread"] = replace_weights(model, read, request["weights"])
    tensors |= answers(model, request["ids"], "file")
    round_inputs(model, read, request["weights"])
    tensors |= answers(model, request["ids"], "rounded")
    del model
    if request["opens"]:
        try:
            opened = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
            tensors |= answers(opened, request["ids"], "opened")
        except Exception as error:  # whatever stops transformers is the answer
            told["opened"] = f"{type(error).__name__}: {error}".splitlines()[0]
    told["luthier"] = "luthier" in sys.modules
    save_file(tensors, request["out"])
    Path(request["out"] + ".json").write_text(json.dumps(told))


def answers(model, probes, name):
    import torch

    return {
        f"{name}{number}": model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().contiguous()
        for number, ids in enumerate(probes)
    }


def continued(model, ids, count):
    """The greedy answer, and by how much each of its tokens leads."""
    import torch

    found, leads = [], []
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].float()
        best = logits.topk(2)
        found.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return [found, leads]


def replace_weights(model, read, weights):
    """Put the file's values into the model; the largest relative error of a weight by kind, and weights it doesn't have."""
    import gguf
    import torch

    errors, left = {}, set(weights)
    for name, weight in model.named_parameters():
        told = weights.get(plain(name))
        if told is None:
            continue
        left.discard(plain(name))
        source, heads, plus = told
        tensor = read[source]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float().reshape(weight.shape)
        if heads:
            values = values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(weight.shape)
        values = values - plus
        norm = float(weight.norm())
        error = float((values - weight).norm()) / norm if norm else float(values.norm())
        kind = tensor.tensor_type.name
        errors[kind] = max(errors.get(kind, 0.0), error)
        weight.copy_(values)
    return errors, sorted(left)


def round_inputs(model, read, weights):
    """Round what goes into every linear layer as llama.cpp does for weights of its kind; its GELU is a table in fp16."""
    import torch

    tied = "output.weight" not in read
    for name, module in model.named_modules():
        if "GELU" in type(module).__name__:
            module.register_forward_hook(
                lambda module, inputs, _: module.forward(inputs[0].half().float()).half().float()
            )
        if not isinstance(module, torch.nn.Linear):
            continue
        told = weights.get(plain(f"{name}.weight"))
        source = told[0] if told else "token_embd.weight" if tied and name.endswith("lm_head") else None
        if source in read:
            kind = read[source].tensor_type.name
            module.register_forward_pre_hook(lambda _, inputs, kind=kind: (rounded(inputs[0], kind),))


def rounded(x, kind):
    if kind == "F32":
        return x
    if kind == "F16":
        return x.half().float()
    if kind == "BF16":
        return x.bfloat16().float()
    blocks = x.reshape(-1, 256 if kind.endswith("_K") else 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scale).round() * scale).reshape(x.shape)


def plain(name):
    """A parameter's name in a text-only model."""
    return name.replace("model.language_model.", "model.")


if __name__ == "__main__":
    main(sys.argv[1])
