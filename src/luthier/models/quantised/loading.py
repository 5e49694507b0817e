"""Quantising while a model is read: each matrix is packed as soon as it is there, and the 16-bit one let go.

transformers reads and converts names as it always does, one tensor after the other where a quantiser is at work, so that
what is in memory at once is the packed model and one layer. A quantiser is announced to transformers through its own
register, under a name of ours; when the model is there nothing of it is left on the model: it is a plain model that holds
a few layers of another kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.models.quantised.choose import Choice, choose
from luthier.models.quantised.formats import Form, kernels, quantise
from luthier.models.quantised.layer import QuantisedLinear
from luthier.models.room import give_back_free

_NAME = "luthier"
_EACH = 64 << 20


class OnTheFly(QuantizationConfigMixin):
    """What `from_pretrained` is given as `quantization_config`; `choice` says afterwards what became of which layer."""

    def __init__(self, form: Form = "nf4", keep: Sequence[str] = ()) -> None:
        self.quant_method = _NAME  # type: ignore[assignment]  # transformers types its own methods only
        self.form, self.keep = form, tuple(keep)
        self.choice: Choice | None = None


def on_the_fly(form: Form, keep: Sequence[str]) -> OnTheFly:
    """A quantisation for `from_pretrained` to apply while it reads.

    Raises:
        RequestError: bitsandbytes is needed and not there.
    """
    if form != "fp8":
        kernels()
    if _NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_NAME)(OnTheFly)
        register_quantizer(_NAME)(_Quantiser)
    return OnTheFly(form, keep)


def quantise_model(model: PreTrainedModel, form: Form, keep: Sequence[str]) -> Choice:
    """Quantise a model that is in memory already, layer by layer, in place."""
    choice = choose(model, form, keep)
    for name in sorted(choice.quantised):
        linear: Any = model.get_submodule(name)
        _replace(model, name, linear.weight.detach(), linear, form)
    return choice


def _replace(model: nn.Module, name: str, weight: torch.Tensor, linear: Any, form: Form) -> None:
    layer = QuantisedLinear(linear.in_features, linear.out_features, form, weight.dtype, bias=linear.bias)
    layer.fill(*quantise(weight, form))
    model.set_submodule(name, layer.train(linear.training))


class _Passed:
    """Gives the system back what passing matrices left free, now and then.

    The allocator keeps freed room for later, and small things that stay come to lie in it, so that the next large matrix does
    not fit there: a model of 200 M weights took twice its size in int8.
    """

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, weight: torch.Tensor) -> None:
        """A matrix was packed."""
        self._bytes += weight.nbytes
        if self._bytes >= (_EACH if weight.device.type == "cpu" else 8 * _EACH):
            self._bytes = 0
            give_back_free()


class _Quantiser(HfQuantizer):
    quantization_config: OnTheFly

    def __init__(self, quantization_config: OnTheFly, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.passed = _Passed()

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes a number: how much of a GPU transformers reserves before it reads, or it would be the 16-bit model's."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        return 0.5625 if self.quantization_config.form == "nf4" else 1.0

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Choose the layers; nothing on the model is changed."""
        config = self.quantization_config
        config.choice = choose(model, config.form, config.keep)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a layer that was chosen."""
        layer, _, last = param_name.rpartition(".")
        assert self.quantization_config.choice is not None
        return last == "weight" and layer in self.quantization_config.choice.quantised

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers runs a chosen weight through."""
        return _Pack(self.quantization_config.form, self.passed)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leave no trace of a quantiser: the model is trained, saved and described by what it holds."""
        self.remove_quantization_config(model)
        vars(model).pop("is_quantized", None)

    def is_serializable(self) -> bool:
        """Not as a whole: adapters on it are saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are."""
        return True


class _Pack(ConversionOps):
    def __init__(self, form: Form, passed: _Passed) -> None:
        self.form, self.passed = form, passed

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **known: Any
    ) -> dict[str, Any]:
        """Replace the layer whose weight came by its quantised form; nothing is left for transformers to set."""
        model, missing = known["model"], known["missing_keys"]
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            linear = model.get_submodule(name)
            if weight.shape != (linear.out_features, linear.in_features):
                return {key: weight}  # transformers names it among those of another shape
            _replace(model, name, weight, linear, self.form)
            missing.discard(key)
            self.passed.add(weight)
        return {}
