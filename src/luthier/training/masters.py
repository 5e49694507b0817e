"""fp32 masters of 16-bit weights, and the small part of them that is not already in the weights.

An update below 16-bit resolution is lost when it is added to a bf16 weight, so the optimiser works on an fp32 master and
the weight is the master rounded. On disk the model folder holds the weights; beside it only the difference is needed.

For bf16 that is 16 bits. A bf16 number is the upper half of an fp32 number, and rounding moves the lower half by at
most 0x8000 units, so ``master bits - (weight bits << 16)`` lies within ±0x8000. Rounding ties to even, as torch does, would
give even weights 65,537 masters, one too many for int16. So ties are rounded away from zero here: every weight then has exactly
the 65,536 masters at -0x8000 … 0x7FFF. Setting a number's lowest bit before torch rounds does that: it turns a
tie into "more than half", and no other number changes sides.
"""

from __future__ import annotations

import torch

from luthier.errors import ArtifactError

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def master_of(weight: torch.Tensor) -> torch.Tensor:
    """An fp32 copy of a 16-bit weight, of the same shape and placement."""
    return weight.detach().to(torch.float32)


@torch.no_grad()
def round_into(weight: torch.Tensor, master: torch.Tensor) -> None:
    """Round an fp32 ``master`` to the nearest number of ``weight``'s dtype, in place; bf16 ties go away from zero."""
    if weight.dtype == torch.bfloat16:
        master = (master.view(torch.int32) | 1).view(torch.float32)
    weight.copy_(master)


@torch.no_grad()
def encode(weight: torch.Tensor, master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the master has beyond its weight.

    Returns the tensor for the file (int16 for bf16, the fp32 master itself for fp16) and a 0-d bool: whether the weight is
    not the rounded master, that is, was changed behind the optimiser's back. Weights that are not finite are left out of that.
    """
    if weight.dtype != torch.bfloat16:
        strange = (weight != master.to(weight.dtype)) & torch.isfinite(weight)
        return master, strange.any()
    difference = master.view(torch.int32) - (weight.view(torch.int16).to(torch.int32) << 16)
    residual = difference.to(torch.int16)
    strange = (residual.to(torch.int32) != difference) & torch.isfinite(weight)
    return residual, strange.any()


@torch.no_grad()
def decode_into(master: torch.Tensor, weight: torch.Tensor, stored: torch.Tensor, name: str) -> None:
    """Restore ``master`` from its weight and what ``encode`` gave; a weight that is not finite becomes its own master.

    Raises ArtifactError if an fp16 weight is not its stored master rounded: they are of two different steps.
    """
    stored = stored.to(weight.device)
    if weight.dtype != torch.bfloat16:
        if bool(((weight != stored.to(weight.dtype)) & torch.isfinite(weight)).any()):
            raise ArtifactError(
                f"The stored fp32 master of {name} does not round to the weight: they are of different steps.",
                code="master-mismatch",
                where=name,
                remedy="Load the weights and the optimiser of one checkpoint.",
            )
        master.copy_(stored)
        return
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + stored.to(torch.int32)
    master.copy_(torch.where(torch.isfinite(weight), bits.view(torch.float32), weight.to(torch.float32)))
