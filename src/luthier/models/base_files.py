"""A base folder's tensors under canonical names, where transformers would not find them in the files as they are."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from luthier.artifacts.files import inside
from luthier.artifacts.names import renamed
from luthier.artifacts.tensorfile import read_header
from luthier.models.folder import pickle_files, weight_files
from luthier.models.pickles import read_pickle


def own_state(folder: Path) -> dict[str, torch.Tensor] | None:
    """Every tensor under its canonical name, or None where the files are safetensors with canonical names already.

    Raises:
        RequestError: a pickle file wants more than tensors.
        ArtifactError: a file is missing or damaged, or two tensors stand for one.
    """
    pickles = pickle_files(folder)
    if pickles:
        tensors: dict[str, torch.Tensor] = {}
        for name in pickles:
            tensors |= read_pickle(inside(folder, name))
    else:
        files = weight_files(folder)
        names = [name for file in files for name in read_header(file)[0]]
        if all(name == plain for name, plain in renamed(names, adapter=False, where=str(folder)).items()):
            return None
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    plain = renamed(tensors, adapter=False, where=str(folder))
    return {plain[name]: tensor for name, tensor in tensors.items()}
