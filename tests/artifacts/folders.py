"""Makers of folders as tools leave them: written byte for byte where the tool itself is not needed. No torch here."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from pathlib import Path

WIDTH = {"F32": 4, "I32": 4, "BF16": 2, "U8": 1, "I8": 1}


def tensor_file(path: Path, tensors: dict[str, tuple], *, fill: int = 1, metadata: dict | None = None, sparse: bool = False) -> Path:  # fmt: skip
    """A safetensors file; `tensors` is name to (dtype, shape), every byte of data is `fill`, or a hole where sparse."""
    entries: dict = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * WIDTH[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return raw_tensor_file(path, entries, b"" if sparse else bytes([fill]) * position, size=position)


def raw_tensor_file(path: Path, entries: object, data: bytes = b"", size: int | None = None) -> Path:
    """A safetensors file with exactly this header, right or wrong."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)
        if size is not None:
            file.truncate(8 + len(header) + size)
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def model_tensors(layers: int = 2, vocab: int = 16, dtype: str = "F32") -> dict[str, tuple]:
    """The tensors of a small Llama."""
    tensors = {"model.embed_tokens.weight": (dtype, (vocab, 8)), "model.norm.weight": (dtype, (8,))}
    return tensors | {f"model.layers.{i}.mlp.up_proj.weight": (dtype, (8, 8)) for i in range(layers)}


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16}


def make_model(folder: Path, *, vocab: int = 16, tokenizer: bool = True, config: dict | None = None) -> Path:
    tensor_file(folder / "model.safetensors", model_tensors(vocab=vocab))
    write_json(folder / "config.json", CONFIG | (config or {}))
    if tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path, *, tokens: int = 16, template: bool = True) -> None:
    write_json(folder / "tokenizer.json", {"model": {"vocab": {f"t{i}": i for i in range(tokens)}}})
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"} if template else {})


def make_shards(folder: Path, shards: int = 3) -> Path:
    weight_map = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {f"model.layers.{number}.mlp.up_proj.weight": ("F32", (8, 8))}
        tensor_file(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", CONFIG)
    make_tokenizer(folder)
    return folder


def adapter_tensors(prefix: str = "base_model.model.", inner: str = "") -> dict[str, tuple]:
    layer = f"{prefix}model.layers.0.mlp.up_proj"
    return {f"{layer}.lora_A{inner}.weight": ("F32", (4, 8)), f"{layer}.lora_B{inner}.weight": ("F32", (8, 4))}


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "base_model_name_or_path": "a/b"}  # fmt: skip


def make_adapter(folder: Path, tensors: dict | None = None, *, config: dict | None = None, fill: int = 1) -> Path:
    tensor_file(folder / "adapter_model.safetensors", tensors or adapter_tensors(), fill=fill)
    write_json(folder / "adapter_config.json", ADAPTER | (config or {}))
    return folder


def torch_archive(path: Path) -> Path:
    """The outside of a file of torch.save: a zip whose first entry is the pickle. Nothing may open the pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'false'\ntR.")
        archive.writestr("archive/version", b"3\n")
    return path


def make_trainer_checkpoint(folder: Path, *, adapter: bool = False, step: int = 10) -> Path:
    make_adapter(folder) if adapter else make_model(folder)
    write_json(folder / "trainer_state.json", {"global_step": step, "log_history": []})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch_archive(folder / name)
    return folder


def make_distcp(folder: Path, ranks: int = 2) -> Path:
    """A save of one small tensor by torch.distributed.checkpoint: a row a rank, in archives without torch's help."""
    names = [f"__{rank}_0.distcp" for rank in range(ranks)]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        torch_archive(folder / name)
    home = "torch.distributed.checkpoint"

    def rows(first: int, count: int) -> bytes:
        return b"ctorch\nSize\n(K" + bytes([first]) + b"K" + bytes([count]) + b"t\x85R"

    chunks = [_made(f"{home}.metadata", "ChunkStorageMetadata", {"offsets": rows(r, 0), "sizes": rows(1, 3)}) for r in range(ranks)]  # fmt: skip
    properties = f"c{home}.metadata\nTensorProperties\n".encode() + b")\x81(ctorch\nfloat32\nNNNNtb"
    tensor = _made(f"{home}.metadata", "TensorStorageMetadata", {"properties": properties, "size": rows(ranks, 3), "chunks": b"](" + b"".join(chunks) + b"e"})  # fmt: skip
    stored = b"}("
    for rank, name in enumerate(names):
        stored += _made(f"{home}.metadata", "MetadataIndex", {"fqn": _text("model.w"), "offset": rows(rank, 0)})
        stored += _made(f"{home}.filesystem", "_StorageInfo", {"relative_path": _text(name), "offset": b"K\0", "length": b"K\x10"})  # fmt: skip
    listed = b"}(" + _text("model.w") + tensor + b"u"
    whole = _made(f"{home}.metadata", "Metadata", {"state_dict_metadata": listed, "storage_data": stored + b"u"})
    (folder / ".metadata").write_bytes(b"\x80\x02" + whole + b".")
    return folder


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _made(module: str, name: str, state: dict[str, bytes]) -> bytes:
    """A pickle's instructions for an object with that state."""
    fields = b"".join(_text(key) + value for key, value in state.items())
    return f"c{module}\n{name}\n".encode() + b")\x81}(" + fields + b"ub"


def gguf_file(path: Path, pairs: dict[str, str], *, version: int = 3, tail: bytes = b"") -> Path:
    """A GGUF file without tensors; every value is a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = b"".join(
        struct.pack("<Q", len(k)) + k.encode() + struct.pack("<IQ", 8, len(v)) + v.encode() for k, v in pairs.items()
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs)) + body + tail)
    return path


def processor_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system
