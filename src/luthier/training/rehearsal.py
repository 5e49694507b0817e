"""Before the first step: everything that could lose the run at its end is tried while nothing is lost yet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts.files import free_bytes, readable_size, write_file
from luthier.artifacts.run_folder import published
from luthier.checkpoint.checkpoints import Checkpoints
from luthier.checkpoint.layout import model_layout
from luthier.config.schema import RunConfig, TrainConfig
from luthier.data.tokens import Tokens
from luthier.errors import LuthierError, RequestError
from luthier.training.optimizers import Optimizer

LEAK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def rehearse_saving(
    config: RunConfig, run: Path, model: nn.Module, optimizer: Optimizer, checkpoints: Checkpoints
) -> int:
    """Plan a save, try the folder, and compare the disk's room with what the run will write.

    Returns:
        The bytes of one checkpoint.

    Raises:
        LuthierError: the folder can't be written, or there is too little room.
        RequestError: a parameter that trains would not be saved.
    """
    saved = set(model_layout(model).sources)
    lost = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in saved]
    if lost:
        raise RequestError(
            f"{len(lost)} parameters would be trained and not saved: {', '.join(lost[:3])}.",
            code="unsaved-parameters",
            where="adapter",
            remedy="Name their modules in adapter.modules_to_save, or leave `adapter` out for full fine-tuning.",
        )
    try:
        trial = run / "checkpoints" / ".writable"
        write_file(trial, b"luthier")
        os.replace(trial, trial.with_name(".writable-too"))
        trial.with_name(".writable-too").unlink()
    except OSError as error:
        raise LuthierError(
            f"checkpoints cannot be written: {error.strerror}.",
            code="not-writable",
            where=str(run / "checkpoints"),
            remedy="Make the folder writable, or set `output` to another one.",
        ) from None
    size = checkpoints.size_of_save(model, optimizer)
    kept = config.checkpoint.keep + (config.checkpoint.best is not None)
    there = min(len(published(run)), kept)  # a resumed run's own, which make room as new ones come
    needed = size * (kept + 1 - there) + (0 if (run / "final").is_dir() else weights_size(model))
    free = free_bytes(run)
    if free < needed:
        raise LuthierError(
            f"{readable_size(free)} are free and the run needs {readable_size(needed)}: {kept + 1 - there} checkpoints "
            f"of {readable_size(size)} each and the final model.",
            code="disk-full",
            where=str(run),
            remedy="Make room, set `output` to another disk, or lower checkpoint.keep.",
        )
    return size


def rehearse_vocabulary(model: Any, tokens: Tokens, vocabulary: int) -> None:
    """See that every token id has a row in the embedding; a GPU would answer a missing one with a device assertion.

    Args:
        vocabulary: the tokenizer's size; where the embedding has a row for each of its ids nothing need be read.

    Raises:
        RequestError: the data holds an id beyond the embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary <= rows:
        return
    largest = max(int(tokens[index][0].max()) for index in range(len(tokens)))
    if largest >= rows:
        raise RequestError(
            f"the tokenizer gives ids up to {largest} and the model has embeddings for {rows} tokens: it is another model's tokenizer.",
            code="vocabulary",
            where="model.path",
            remedy="Put the tokenizer that belongs to this model into its folder, or add tokens with model.new_tokens.",
        )


def weights_size(model: nn.Module) -> int:
    """Bytes of what the final folder holds, should its files not be shared with the last checkpoint."""
    return sum(item.spec.size for item in model_layout(model).stored)


def rehearse_packing(model: nn.Module, tokens: Tokens, train: TrainConfig, device: torch.device) -> None:
    """See that a packed sample cannot see its neighbour: change the first of two and compare the second's logits.

    Two rows are tried at once where the run computes several: transformers' flash attention finds the borders between
    samples in the position ids of a single row only.

    Raises:
        RequestError: it can; this model's code doesn't keep packed samples apart.
    """
    if len(tokens) < 2:
        return
    rows = min(2, train.micro_batch)
    second = torch.from_numpy(tokens[1][0][:8].astype("int64"))
    first = torch.from_numpy(tokens[0][0][:8].astype("int64"))
    other = (first + 1) % int(max(first.max(), second.max()) + 1)
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))]).expand(rows, -1).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            model(
                input_ids=torch.cat([front, second]).expand(rows, -1).to(device),
                position_ids=positions,
                use_cache=False,
            ).logits[:, len(first) :]
            for front in (first, other)
        ]
    model.train(was_training)
    difference = float((logits[0] - logits[1]).abs().max())
    allowed = LEAK_TOLERANCE.get(logits[0].dtype, 1e-3) * float(logits[0].abs().max())
    if difference > allowed:
        raise RequestError(
            f"samples packed into one row see each other in this model (its logits move by {difference:.3g} when the neighbour changes).",
            code="packing-leaks",
            where="train.packing",
            remedy="Set train.packing: false, or another model.attention.",
        )
