"""Small folders of ours, byte for byte, without torch: weights, config, proof, manifest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from luthier.artifacts import manifest as manifests
from luthier.artifacts.manifest import Manifest, digest_file, stretches
from luthier.artifacts.tensorfile import read_header

sys.path.insert(0, str(Path(__file__).parents[1] / "artifacts"))
from folders import gguf_file, make_adapter, make_model, make_shards, write_json

__all__ = ["finished_run", "gguf_file", "make_adapter", "make_model", "make_shards", "ours", "write_json"]

PROOF = {"verdict": "passed", "passed": True, "says": "opened by plain libraries, equal bits.", "format": 1}


def ours(folder: Path, kind: str, *, proof: dict | None = PROOF, **facts: object) -> Path:
    """A folder with a card, a proof and a manifest that matches it."""
    if proof:
        write_json(folder / "proof.json", proof)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text('---\nlibrary_name: x\n---\n\n# x\n\nX.from_pretrained("FOLDER")\n')
    places, digests, files = [], [], {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != manifests.NAME):
        name = path.relative_to(folder).as_posix()
        files[name] = path.stat().st_size
        own = list(read_header(path)[0].values()) if path.suffix == ".safetensors" else []
        places += [type(place)(place.spec, name, place.offset) for place in own]
        digests += digest_file(path, name, stretches(files[name], own or None))
    manifests.write(folder, Manifest(kind, files, tuple(digests), tuple(places), {"parents": [], **facts}))
    return folder


def finished_run(run: Path, **settings: object) -> Path:
    """A run as training leaves it: final, a checkpoint with its training state, metrics, and its lock."""
    write_json(run / "run.yaml", {"model": "a/b", "format": 1})
    make_adapter(run / "checkpoints/step-00000004/adapter", config=settings)
    write_json(run / "checkpoints/step-00000004/trainer/state.json", {"step": 4})
    ours(run / "checkpoints/step-00000004", "checkpoint", proof=None, step=4)
    make_adapter(run / "final", config=settings)
    ours(run / "final", "adapter", step=4, fingerprint="f" * 64, base={"name": settings.get("base_model_name_or_path", "a/b")})  # fmt: skip
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 4, "loss": 1.0, "time": 1.0}) + "\n")
    return run
