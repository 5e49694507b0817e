"""A base folder's tensors under canonical names, where transformers would not find them in the files as they are."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from luthier.artifacts.files import inside
from luthier.artifacts.names import renamed
from luthier.artifacts.tensorfile import read_header
from luthier.models.check_folder import pickle_files, weight_files
from luthier.models.pickles import read_pickle


def is_plain(folder: Path) -> bool:
    """Whether the weights are safetensors with canonical names, which transformers finds as they are.

    Raises:
        ArtifactError: a file is missing or damaged, or two tensors stand for one.
    """
    if pickle_files(folder):
        return False
    names = [name for file in weight_files(folder) for name in read_header(file)[0]]
    return all(name == plain for name, plain in renamed(names, adapter=False, where=str(folder)).items())


def own_state(folder: Path) -> dict[str, torch.Tensor] | None:
    """Every tensor under its canonical name, or None where the files are plain.

    Raises:
        RequestError: a pickle file wants more than tensors.
        ArtifactError: a file is missing or damaged, or two tensors stand for one.
    """
    if is_plain(folder):
        return None
    tensors: dict[str, torch.Tensor] = {}
    for name in pickle_files(folder):
        tensors |= read_pickle(inside(folder, name))
    for file in weight_files(folder) if not tensors else ():
        tensors |= load_file(file)
    plain = renamed(tensors, adapter=False, where=str(folder))
    return {plain[name]: tensor for name, tensor in tensors.items()}
