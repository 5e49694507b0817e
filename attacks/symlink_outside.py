"""Weights that are a link to a file outside the folder: unpacked from an archive, then copied or uploaded, it leaks that file."""

from pathlib import Path

from common import run, tensor_file


def build(folder: Path, marker: Path) -> Path:
    secret = folder.parent / "secret.safetensors"
    tensor_file(secret, {"model.norm.weight": {"dtype": "U8", "shape": [6], "data_offsets": [0, 6]}}, b"secret")
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "model.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(f"../{secret.name}")
    return link


if __name__ == "__main__":
    run(build)
