"""The values that an adapter saw where its base was quantised while it was read for training.

The base's files hold 16-bit weights; in training each matrix was packed to codes and multiplied as what the codes stand for.
Both are done again here for the rows that a stretch needs: packing never crosses rows (`luthier.models.quantised.formats`),
so any stretch gives the bits that the whole layer had. Which layers were packed is decided as for training, by the same
function, and compared with what the adapter's manifest says stayed as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts import manifest as manifests
from luthier.artifacts.tensorfile import Place
from luthier.checkpoint.dtypes import FROM_FILE
from luthier.errors import RequestError
from luthier.export import exported_folder as folders
from luthier.export.merged.plan import stretches_of
from luthier.export.naming import empty_model
from luthier.export.source import Source
from luthier.export.stream import Output
from luthier.models.quantised.formats import FORMS, Form, dequantise, quantise

AT_ONCE = 1 << 20  # elements packed at a time


@dataclass(frozen=True)
class Quantised:
    """How a base was quantised in training, as the manifests of adapters on it say.

    Attributes:
        kept: linear layers that stayed as they were.
        keep: what was asked to stay.
        dtype: safetensors' word for the dtype that was packed and multiplied in; the files' own and fp32 where it isn't known.
    """

    form: Form
    kept: tuple[str, ...]
    keep: tuple[str, ...]
    dtype: str | None = None

    def asked(self) -> dict[str, Any]:
        """What a proof asks plain libraries for."""
        return {"precision": self.form, "skip": list(self.kept)}


def quantised_in_training(adapter: Path) -> Quantised | None:
    """How the base under an adapter was quantised as it was read; None where it was not, or nothing says so.

    Raises:
        RequestError: the manifest names a form that this version does not know.
    """
    home = adapter if (adapter / manifests.NAME).is_file() else adapter.parent
    base = (manifests.read(home).facts.get("base") if (home / manifests.NAME).is_file() else None) or {}
    told = base.get("quantisation")
    if not told:
        return None
    form = next((form for form in FORMS if form == told["precision"]), None)
    if form is None:
        raise RequestError(
            f"the base is said to be quantised to {told['precision']!r}, which is no form known here.",
            code="onto",
            where=str(home / manifests.NAME),
            remedy="Merge into the original weights with --onto original.",
        )
    word = next((word for word, name in folders.DTYPES.items() if name == base.get("dtype")), None)
    return Quantised(form, tuple(told["kept"]), tuple(told["keep_16bit"]), word)


def as_trained(source: Source, how: Quantised) -> Source:
    """The source's tensors as the training multiplied them.

    Raises:
        RequestError: other layers would be packed than were in training, or bitsandbytes is needed and not there.
    """
    from luthier.models.quantised.choose import choose

    model = empty_model(source.folder)
    choice = choose(model, how.form, how.keep)
    if set(choice.kept) != set(how.kept):
        odd = sorted(set(choice.kept) ^ set(how.kept))
        raise RequestError(
            f"in training {odd[0]} was {'kept as it was' if odd[0] in how.kept else 'quantised'}, and here it would be "
            f"{'quantised' if odd[0] in how.kept else 'kept'}, so the values that the adapter saw can't be made again.",
            code="onto",
            where=str(source.folder),
            remedy="Merge into the original weights with --onto original.",
        )
    packed: set[str] = set()
    for name in sorted(choice.quantised):
        columns = model.get_submodule(name).in_features
        for stretch in stretches_of(source, f"{name}.weight"):
            if source.specs[stretch.file].shape[-1] != columns:
                raise RequestError(
                    f"{stretch.file} does not hold whole rows of {name}, so the values that the adapter saw can't be made in a stream.",
                    code="onto",
                    where=str(source.folder),
                    remedy="Merge into the original weights with --onto original.",
                )
            packed.add(stretch.file)
    return AsTrained(source, packed, how)


class AsTrained(Source):
    """A folder's tensors, those of packed layers as dequantise(quantise(W)).

    Attributes:
        inner: the source of the weights as they are.
    """

    def __init__(self, inner: Source, packed: set[str], how: Quantised) -> None:
        self.inner, self._packed, self._how = inner, packed, how
        word = how.dtype or "F32"
        specs = {name: replace(spec, dtype=word) if name in packed else spec for name, spec in inner.specs.items()}
        super().__init__(inner.folder, specs)
        self.file_of = dict(inner.file_of)

    def place(self, name: str) -> Place | None:
        return None if name in self._packed else self.inner.place(name)

    def same(self, one: str, other: str) -> bool:
        return self.inner.same(one, other)

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        if name not in self._packed:
            self.inner.read(name, start, target)
            return
        spec = self.inner.specs[name]
        columns, own = spec.shape[-1], FROM_FILE[spec.dtype]
        end, step = start + target.numel(), max(1, AT_ONCE // columns)
        last = -(-end // columns)
        for low in range(start // columns, last, step):
            high = min(low + step, last)
            held = torch.empty((high - low) * columns, dtype=own)
            self.inner.read(name, low * columns, held)
            values = self._values(held.view(-1, columns), target.dtype)
            at, until = max(low * columns, start), min(high * columns, end)
            target[at - start : until - start] = values[at - low * columns : until - low * columns]

    def _values(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._how.dtype is not None:
            weight = weight.to(FROM_FILE[self._how.dtype])
        codes, scales = quantise(weight, self._how.form)
        return dequantise(codes, scales, self._how.form, dtype).reshape(-1)

    def close(self) -> None:
        self.inner.close()


def in_the_files_dtypes(outputs: Sequence[Output], source: Source) -> list[Output]:
    """The outputs with each tensor of the source in the dtype that it has in the files, not in that of its values here."""
    if not isinstance(source, AsTrained):
        return list(outputs)
    stored = source.inner.specs
    return [
        replace(each, spec=replace(each.spec, dtype=stored[each.name].dtype)) if each.source is source else each
        for each in outputs
    ]
