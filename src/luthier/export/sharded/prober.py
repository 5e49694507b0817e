"""Opens a converted folder, and the sharded checkpoint it was made from, with torch and transformers alone. Run as a script.

The checkpoint is read by torch's own reader, and its tensors are given to transformers; so neither our reader nor our
writer is between it and the answer. It must not import luthier. It reads a request as JSON from the file named by its first
argument:

    {"folder": …, "source": …, "reader": "distcp", "safetensors" or "torch", "nested": key or null, "names": {name in files: name in the save},
     "ids": [[…], …], "dtype": "bfloat16", "threads": 2}

and prints one line of JSON: how many tensors the opened model holds, which of them differ in a bit, and the largest difference
of the logits. One model is in memory at a time.
"""

import hashlib
import json
import sys
from pathlib import Path


def main(request_path):
    request = json.loads(Path(request_path).read_text())
    import torch

    torch.set_num_threads(request["threads"])
    wanted, expected = answers(from_source(request), request["ids"])
    found, logits = answers(from_folder(request), request["ids"])
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    apart = max(distance(left, right) for left, right in zip(expected, logits))
    finite = all(bool(one.isfinite().all()) for one in expected)
    told = {
        "tensors": len(found),
        "different": different,
        "apart": apart,
        "finite": finite,
        "luthier": "luthier" in sys.modules,
    }
    print(json.dumps(told))


def distance(left, right):
    """Zero for equal bits, also where they are of no number."""
    import torch

    same = torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))
    return 0.0 if same else float((left - right).abs().max())


def answers(model, prompts):
    """A digest of every tensor of a model, and its logits."""
    import torch

    model.eval()
    digests = {}
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        digests[name] = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + bits.data).hexdigest()
    with torch.no_grad():
        return digests, [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in prompts]


def kind_of(config):
    import transformers

    return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)


def from_folder(request):
    """What a user would type."""
    import torch
    from transformers import AutoConfig

    kind = kind_of(AutoConfig.from_pretrained(request["folder"], local_files_only=True))
    return kind.from_pretrained(request["folder"], dtype=getattr(torch, request["dtype"]), local_files_only=True)


def from_source(request):
    """The model of the converted folder's config, with the tensors that torch reads from the checkpoint."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(request["folder"], local_files_only=True)
    read = {"distcp": by_checkpoint_reader, "safetensors": by_checkpoint_reader, "torch": by_torch_load}
    tensors = read[request["reader"]](request)
    dtype = getattr(torch, request["dtype"])
    state = {
        name: tensors[own].to(dtype) if tensors[own].is_floating_point() else tensors[own]
        for name, own in request["names"].items()
    }
    model, loading = kind_of(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise SystemExit(
            f"missing {sorted(loading['missing_keys'])[:3]}, unexpected {sorted(loading['unexpected_keys'])[:3]}"
        )
    return model


def by_checkpoint_reader(request):
    """Tensors of a folder by torch.distributed.checkpoint, in one process."""
    import torch
    import torch.distributed.checkpoint as dcp

    if request["reader"] == "safetensors":
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader as Reader
    else:
        Reader = dcp.FileSystemReader
    kept = set(request["names"].values())
    described = Reader(request["source"]).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in described.items() if name in kept
    }
    dcp.load(tensors, storage_reader=Reader(request["source"]), no_dist=True)
    return tensors


def by_torch_load(request):
    """Tensors of files that torch.save wrote."""
    import torch

    tensors = {}
    for path in request["files"]:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        tensors |= content[request["nested"]] if request["nested"] else content
    return tensors


if __name__ == "__main__":
    main(sys.argv[1])
