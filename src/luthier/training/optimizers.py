"""The optimiser of a run: named parameters in, named tensors out, fp32 wherever sums are made.

The loop calls, for each step: ``accumulate`` after every backward, then ``scale_gradients``, ``clip``, ``step`` and
``zero_grad``. A checkpoint takes ``state_tensors`` and ``master_tensors`` and gives them back to ``load_tensors``; after
that the next step is bit for bit the one that would have followed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from luthier.config.schema import OptimConfig
from luthier.errors import ArtifactError, RequestError
from luthier.training.engines import EngineName, Group, make
from luthier.training.groups import Member, Role, decay_of, members, peak_rate, rate_of
from luthier.training.masters import SIXTEEN_BIT, decode_into, encode, master_of, round_into

MARK = "::"
_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s, so that clipping gives its bits


@dataclass
class _Slot:
    """One trainable parameter, the tensor that is updated for it, and its summed gradient.

    Attributes:
        name: as in ``model.named_parameters()``.
        parameter: the model's.
        weight: the parameter itself, or its fp32 master.
        total: gradient of a 16-bit parameter summed over micro-batches, fp32; others sum in ``parameter.grad``.
    """

    name: str
    parameter: nn.Parameter
    weight: torch.Tensor
    total: torch.Tensor | None = None

    @property
    def is_narrow(self) -> bool:
        return self.parameter.dtype in SIXTEEN_BIT

    @property
    def has_master(self) -> bool:
        return self.weight is not self.parameter

    @property
    def gradient(self) -> torch.Tensor | None:
        return self.total if self.is_narrow else self.parameter.grad


@dataclass(frozen=True)
class _Line:
    """What ``describe`` says about one group."""

    engine: EngineName
    role: Role
    slots: list[_Slot]
    lr: float
    weight_decay: float


class Optimizer:
    """Updates the trainable parameters of one model; made by ``build``.

    Attributes:
        base_rate: peak learning rate of parameters without a rate of their own.
    """

    def __init__(self, slots: list[_Slot], lines: list[_Line], optim: OptimConfig, base_rate: float) -> None:
        self.base_rate = base_rate
        self._slots = slots
        self._lines = lines
        self._engines: list[torch.optim.Optimizer] = []
        self._states: dict[str, dict[str, torch.Tensor | int]] = {}
        for engine_name in dict.fromkeys(line.engine for line in lines):
            mine = [line for line in lines if line.engine == engine_name]
            groups = [Group([slot.weight for slot in line.slots], line.lr, line.weight_decay) for line in mine]
            engine = make(engine_name, groups, optim)
            for line in mine:
                self._states |= {slot.name: engine.state[slot.weight] for slot in line.slots}
            self._engines.append(engine)
        self._peaks = [(group, group["lr"]) for engine in self._engines for group in engine.param_groups]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of 16-bit parameters to their fp32 sums and free them; to be called after every backward."""
        for slot in self._slots:
            gradient = slot.parameter.grad
            if not slot.is_narrow or gradient is None:
                continue
            if slot.total is None:
                slot.total = gradient.to(torch.float32)
            else:
                slot.total.add_(gradient)
            slot.parameter.grad = None

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply every summed gradient by ``factor``."""
        gradients = self._gradients()
        if gradients:
            torch._foreach_mul_(gradients, factor)

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scale the whole gradient down to ``max_norm`` if it is longer.

        Returns its norm before, a 0-d fp32 tensor on the gradients' device; NaN or infinite where a gradient is.
        """
        gradients = self._gradients()
        if not gradients:
            return torch.zeros(())
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + _EPSILON), max=1.0))
        return norm

    def finite(self, norm: torch.Tensor) -> bool:
        """Whether a norm from ``clip`` is a number to step with; waits for the device."""
        return bool(torch.isfinite(norm))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter that has a gradient, at ``rate`` times its group's peak rate."""
        for group, peak in self._peaks:
            group["lr"] = peak * rate
        narrow = [(slot, slot.total) for slot in self._slots if slot.total is not None]
        for slot, total in narrow:
            slot.weight.grad = total if slot.has_master else total.to(slot.parameter.dtype)
        for engine in self._engines:
            engine.step()
        for slot, _ in narrow:
            slot.weight.grad = None
            if slot.has_master:
                round_into(slot.parameter, slot.weight)

    def zero_grad(self) -> None:
        """Free every gradient."""
        for slot in self._slots:
            slot.parameter.grad = None
            slot.total = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Every state as ``PARAMETER::state``, ordered by name.

        They are the live tensors, which the next step changes; counters are 0-d tensors.
        """
        return {
            f"{slot.name}{MARK}{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
            for slot in self._slots
            for key, value in sorted(self._states[slot.name].items())
        }

    def master_tensors(self) -> dict[str, torch.Tensor]:
        """What fp32 masters have beyond their weights, as ``PARAMETER::master``: int16 for bf16, fp32 for fp16.

        Raises ArtifactError for a weight that was changed by something other than this optimiser.
        """
        tensors: dict[str, torch.Tensor] = {}
        strange: list[tuple[str, torch.Tensor]] = []
        for slot in self._slots:
            if slot.has_master:
                tensors[f"{slot.name}{MARK}master"], changed = encode(slot.parameter, slot.weight)
                strange.append((slot.name, changed))
        names = [name for name, changed in strange if bool(changed)]
        if names:
            raise ArtifactError(
                f"Weights are not their fp32 masters rounded: {_some(names)}. Something other than the optimiser changed them, "
                "and the next step would undo that.",
                code="master-mismatch",
                where=names[0],
                remedy="Change weights before training starts, or take `optim.master: none`.",
            )
        return tensors

    @torch.no_grad()
    def load_tensors(self, states: Mapping[str, torch.Tensor], masters: Mapping[str, torch.Tensor]) -> None:
        """Take up what ``state_tensors`` and ``master_tensors`` gave; the model must hold that step's weights already.

        Raises ArtifactError naming tensors that are missing, too many, or of another shape or dtype; nothing is changed then.
        """
        _match("optimiser states", self.state_tensors(), states)
        expected = {f"{slot.name}{MARK}master": slot for slot in self._slots if slot.has_master}
        _match("fp32 masters", {name: _stored_form(slot) for name, slot in expected.items()}, masters)
        for name, slot in expected.items():
            decode_into(slot.weight, slot.parameter, masters[name], slot.name)
        for slot in self._slots:
            state = self._states[slot.name]
            for key, value in state.items():
                given = states[f"{slot.name}{MARK}{key}"]
                if isinstance(value, torch.Tensor):
                    value.copy_(given)
                else:
                    state[key] = int(given)

    def describe(self) -> list[str]:
        """One line a group: which optimiser updates what, how much of it, at which peak rate and decay."""
        lines = []
        for line in self._lines:
            count = sum(slot.parameter.numel() for slot in line.slots)
            tensors = "tensor" if len(line.slots) == 1 else "tensors"
            text = (
                f"{line.engine}: {line.role.value}, {len(line.slots)} {tensors}, {count:,} parameters, lr {line.lr:g}"
            )
            if line.engine == "Adafactor":
                text += " × each tensor's root mean square"
            if line.weight_decay:
                text += f", weight decay {line.weight_decay:g}"
            if any(slot.has_master for slot in line.slots):
                text += ", fp32 masters"
            if len({each.engine for each in self._lines}) > 1:
                text += f": {_patterns(slot.name for slot in line.slots)}"
            lines.append(text)
        return lines

    def _gradients(self) -> list[torch.Tensor]:
        return [slot.gradient for slot in self._slots if slot.gradient is not None]


def build(model: nn.Module, optim: OptimConfig, *, adapter: bool) -> Optimizer:
    """Build the optimiser over the trainable parameters of ``model``, its states at zero.

    Args:
        model: its weights are loaded, cast and on their device.
        optim: the run file's section.
        adapter: whether an adapter trains; decides the default rate, and Muon is not for adapters.

    Raises RequestError if nothing trains, for Muon with an adapter, or where 8-bit states do not work.
    """
    if optim.name == "muon" and adapter:
        raise RequestError(
            "Muon trains the matrices of full fine-tuning; an adapter's are low-rank factors, which it is not meant for.",
            code="optimizer",
            where="optim.name",
            remedy="Take `optim.name: adamw` or adafactor.",
        )
    found = members(model)
    if not found:
        raise RequestError(
            "No parameter of the model requires a gradient, so nothing would train.",
            code="nothing-trains",
            where="adapter",
        )
    peak = peak_rate(optim, adapter=adapter)
    slots = {member.name: _slot(member, optim) for member in found}
    lines = []
    for engine, role in sorted(
        {(_engine(member, optim), member.role) for member in found}, key=lambda pair: (pair[0], pair[1].value)
    ):
        mine = [slots[member.name] for member in found if (_engine(member, optim), member.role) == (engine, role)]
        lines.append(_Line(engine, role, mine, rate_of(role, peak, optim), decay_of(role, optim)))
    return Optimizer(list(slots.values()), lines, optim, peak)


def _engine(member: Member, optim: OptimConfig) -> EngineName:
    if optim.name == "adafactor":
        return "Adafactor"
    if optim.name == "muon":
        return "Muon" if member.role is Role.MATRIX else "AdamW"
    if optim.states == "8bit" and member.role is not Role.EMBEDDING:
        return "AdamW 8-bit"  # embeddings keep fp32 states, as bitsandbytes advises: their gradients are too uneven
    return "AdamW"


def _slot(member: Member, optim: OptimConfig) -> _Slot:
    parameter = member.parameter
    keeps_master = optim.master == "fp32" and parameter.dtype in SIXTEEN_BIT
    return _Slot(member.name, parameter, master_of(parameter) if keeps_master else parameter)


def _stored_form(slot: _Slot) -> torch.Tensor:
    """A tensor without content, of the shape and dtype that ``master_tensors`` gives for this slot."""
    dtype = torch.int16 if slot.parameter.dtype == torch.bfloat16 else torch.float32
    return torch.empty(slot.parameter.shape, dtype=dtype, device="meta")


def _match(what: str, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in expected if name not in given]
    strangers = sorted(name for name in given if name not in expected)
    wrong = [
        f"{name} is {_form(given[name])}, {_form(tensor)} is wanted"
        for name, tensor in expected.items()
        if name in given and (given[name].shape != tensor.shape or given[name].dtype != tensor.dtype)
    ]
    parts = []
    if missing:
        parts.append(f"missing: {_some(missing)}")
    if strangers:
        parts.append(f"not of this model or optimiser: {_some(strangers)}")
    if wrong:
        parts.append(_some(wrong))
    if parts:
        raise ArtifactError(
            f"The {what} of the checkpoint are not those of this run; {'; '.join(parts)}.",
            code="optimizer-tensors",
            where="trainer",
            remedy="Resume with the model, adapter and optimiser that the checkpoint was written with.",
        )


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _patterns(names: Iterable[str]) -> str:
    """Names with their layer numbers replaced by ``*``, each with how often it occurs."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts.items())
