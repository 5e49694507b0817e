"""LoRA on a quantised layer, registered with peft config by config through its hook for custom modules.

Dispatched as a plain linear layer, variants and merges would take codes for weights without a word. Here DoRA gets the
dequantised weight, and what would write into the weight is refused by name.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from luthier.errors import RequestError
from luthier.models.quantised.layer import QuantisedLinear, quantised_layers

_PLAIN_STARTS = (True, False, "gaussian")


def is_quantised(model: nn.Module) -> bool:
    """Whether a model holds layers in 4 or 8 bits that Luthier quantised."""
    return bool(quantised_layers(model))


def register(config: PeftConfig, model: nn.Module) -> None:
    """Let peft put adapters of this config on the model's quantised layers; one without any is left as it is.

    Raises:
        RequestError: the method is none that such layers carry.
    """
    if not is_quantised(model):
        return
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        raise RequestError(
            f"{kind} has no form for a base in 4 or 8 bits.",
            code="bad-adapter",
            where="adapter.type",
            remedy="Take lora (dora: true and rslora: true work too), or a 16-bit model.precision.",
        )
    config._register_custom_module({QuantisedLinear: QuantisedLora})


class QuantisedLora(peft_layer.Linear):
    """peft's LoRA layer on a quantised one.

    The sum is rounded as peft rounds it for those who open the base with plain libraries: on bitsandbytes' layers the
    adapter's part first, on a 16-bit layer (which fp8 is opened as) once.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA and DoRA; peft refuses every other combination by name."""
        return {(): None, ("use_dora",): DoraLinearVariant}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; raises RequestError for a start that would change the base's weights."""
        start = config.init_lora_weights
        if start not in _PLAIN_STARTS:
            raise RequestError(
                f"init_lora_weights {start!r} reads or changes the base's weights, which are codes here.",
                code="bad-adapter",
                where="adapter.init_lora_weights",
                remedy="Take true, false or gaussian, or a 16-bit model.precision.",
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the sum would be rounded to 4 or 8 bits again, and lose most of the adapter."""
        raise RequestError(
            "an adapter can't be merged into weights of 4 or 8 bits in memory: rounded to codes again, most of it would be lost.",
            code="cannot-merge",
            where="merge",
            remedy="Merge the saved adapter into its 16-bit base: luthier export RUN OUT --to merged.",
        )

    def unmerge(self) -> None:
        """Nothing is ever merged here, so there is nothing to undo."""

    def get_base_layer(self) -> QuantisedLinear:
        """The quantised layer."""
        return cast(QuantisedLinear, super().get_base_layer())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (…, in) to (…, out); the adapter computes in its own dtype, its result is rounded to the layer's."""
        plain = kwargs.get("adapter_names") is None and not self.lora_variant and not self.disable_adapters
        if not plain or self.get_base_layer().form == "fp8":
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                inner = self.lora_dropout[name](
                    self._cast_input_dtype(x, cast(nn.Linear, self.lora_A[name]).weight.dtype)
                )
                update = self.lora_B[name](self.lora_A[name](inner)) * self.scaling[name]
                result = result + update.to(result.dtype)
        return result

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return cast(QuantisedLinear, module).in_features, cast(QuantisedLinear, module).out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return cast(QuantisedLinear, base_layer).codes.device, None
