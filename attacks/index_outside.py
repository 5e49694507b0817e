"""An index that places a tensor in a file outside the folder. A loader that joins the paths reads it."""

from pathlib import Path

from common import run, tensor_file, write_json


def build(folder: Path, marker: Path) -> Path:
    secret = folder.parent / "secret.safetensors"
    tensor_file(secret, {"model.norm.weight": {"dtype": "U8", "shape": [6], "data_offsets": [0, 6]}}, b"secret")
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {"model.norm.weight": f"../{secret.name}"}
    return write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


if __name__ == "__main__":
    run(build)
