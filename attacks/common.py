"""What the attacks share: a payload that leaves a harmless mark, and tensor files written byte for byte."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path


class Payload:
    """Unpickling this calls a function of the attacker's choice; here it creates an empty file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return open, (self.marker, "w")


def torch_file(path: Path, marker: Path) -> Path:
    """What torch.save writes, with the payload in it."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(2), "payload": Payload(marker)}, path)
    return path


def tensor_file(path: Path, header: dict, data: bytes) -> Path:
    """A safetensors file with this header, right or wrong."""
    body = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return path


def write_json(path: Path, change: dict) -> Path:
    """Change keys of a JSON file, or make it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | change, indent=1))
    return path


def run(build: Callable[[Path, Path], object]) -> None:
    """``python attacks/NAME.py FOLDER [MARKER]``: put the attack into a folder, which may hold a model."""
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: python {sys.argv[0]} FOLDER [MARKER]")
    marker = Path(sys.argv[-1] if len(sys.argv) == 3 else "attacked").resolve()
    print(f"{build(Path(sys.argv[1]), marker)}: opened naively, it creates {marker} or reads what it should not")
