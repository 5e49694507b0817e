"""Folders that transformers and bitsandbytes quantised, in layers of ours: the bytes of the codes stay what they are.

transformers reads such a folder as it always does; then each of bitsandbytes' layers is replaced by one of ours that holds
the same codes, so that scales have names and are no attributes of a weight. Per layer and nothing beside it:

    nf4, fp4    codes as they lie, whatever dtype they are stored as; the scale of a block in fp32. Scales that were quantised
                once more (double quantisation) are expanded as bitsandbytes does before it multiplies.
    int8        codes as they lie; SCB, the largest magnitude of a row, is the row's scale. Multiplied as LLM.int8() does, with
                the folder's own threshold.

So the values computed with are bitsandbytes' own. What has no such layer is refused: blocks that cross rows, weights
that int8 holds in 16 bits, and orders of codes of older versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from luthier.config.schema import AdapterConfig, ModelConfig
from luthier.errors import ArtifactError, RequestError
from luthier.models.quantised.formats import Packed, as_bytes
from luthier.models.quantised.layer import QuantisedLinear

_PLAIN_STARTS = (None, True, False, "gaussian")


def is_existing(config: Any) -> bool:
    """Whether a config (transformers', or a dict of it) is that of a folder with quantised weights."""
    told = config.get("quantization_config") if isinstance(config, Mapping) else getattr(config, "quantization_config", None)  # fmt: skip
    return bool(told)


def carries(adapter: Mapping[str, Any]) -> bool:
    """Whether our layers carry an adapter of this config; what else peft has goes onto bitsandbytes' own."""
    kind = str(adapter.get("peft_type", "")).upper()
    odd = [key for key, value in adapter.items() if key.startswith("use_") and value and key not in ("use_rslora", "use_dora")]  # fmt: skip
    return kind == "LORA" and adapter.get("init_lora_weights") in _PLAIN_STARTS and not odd


def check_request(model: ModelConfig, adapter: AdapterConfig | None) -> None:
    """Refuse what can't be asked of a base that was quantised already.

    Raises:
        RequestError: it can't.
    """
    if model.precision is not None:
        raise own_precision(model.path)
    if adapter is None or adapter.type.lower() != "lora":
        what = "codes, which no gradient changes" if adapter is None else f"codes, which adapter.type {adapter.type} has no form for"  # fmt: skip
        raise RequestError(
            f"{model.path} is quantised: its weights are {what}.",
            code="quantised-base",
            where="adapter",
            remedy="Set adapter: lora, or take the original weights.",
        )
    for key, given in (("keep_16bit", model.keep_16bit), ("new_tokens", model.new_tokens)):
        if given:
            raise RequestError(
                f"{model.path} is quantised, and opened as it lies there.",
                code="quantised-base",
                where=f"model.{key}",
                remedy=f"Leave model.{key} out, or take the original weights with model.precision.",
            )


def own_precision(path: str) -> RequestError:
    """The error where another precision is asked for than a quantised folder has."""
    return RequestError(
        f"{path} is quantised, so its precision is the folder's own.",
        code="quantised-base",
        where="precision",
        remedy="Leave `precision` out.",
    )


def own_layers(model: PreTrainedModel, where: str) -> None:
    """Replace bitsandbytes' layers by ours that hold the same bytes, in place, and let go of what transformers left on the model.

    Raises:
        RequestError: a layer is held in a way that ours can't hold.
        ArtifactError: a layer lacks its scales.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    threshold = float(getattr(model.config.quantization_config, "llm_int8_threshold", 6.0))
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            _replace(model, name, module, *_four_bits(module, f"{name} of {where}"))
        elif isinstance(module, Linear8bitLt):
            own = _replace(model, name, module, "int8", _eight_bits(module, f"{name} of {where}"))
            own.multiplies, own.threshold = "llm.int8", threshold
    _forget(model)


def check_order(files: Iterable[Path]) -> None:
    """Raises RequestError where int8 codes lie in an order of older versions, which transformers takes for rows without a word."""
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                if name.endswith(".weight_format") and int(opened.get_tensor(name)):
                    raise RequestError(
                        f"{name} is {int(opened.get_tensor(name))}: its codes don't lie row by row, which today's bitsandbytes can't read either.",
                        code="quantised-form",
                        where=str(file),
                        remedy="Take the original weights with model.precision: int8.",
                    )


def _replace(model: PreTrainedModel, name: str, module: Any, form: Any, packed: Packed) -> QuantisedLinear:
    own = QuantisedLinear(module.in_features, module.out_features, form, model.dtype, bias=module.bias)
    own.fill(*packed)
    own.is_given = True
    own.product_in = getattr(module, "compute_dtype", None)
    model.set_submodule(name, own.train(module.training))
    return own


def _four_bits(module: Any, where: str) -> tuple[str, Packed]:
    from bitsandbytes.functional import dequantize_blockwise

    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise _no_scales(where)
    rows, columns = module.out_features, module.in_features
    if tuple(state.shape) != (rows, columns) or columns % state.blocksize:
        raise RequestError(
            f"its rows of {columns} don't divide into blocks of {state.blocksize}, so that blocks cross rows.",
            code="quantised-form",
            where=where,
            remedy=_UNPACK,
        )
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    codes = module.weight.data.contiguous().view(torch.uint8).reshape(rows, columns // 2)
    return state.quant_type, Packed(codes, as_bytes(scales).view(rows, -1))


def _eight_bits(module: Any, where: str) -> Packed:
    if module.state.has_fp16_weights:
        raise RequestError(
            "its config says llm_int8_has_fp16_weight: the weights are in 16 bits, and rounded anew at every product.",
            code="quantised-form",
            where=where,
            remedy="Take the original weights with model.precision: int8.",
        )
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if module.weight.dtype is not torch.int8 or scales is None:
        raise _no_scales(where)
    return Packed(module.weight.data.contiguous().view(torch.uint8), as_bytes(scales.view(-1, 1)))


def _no_scales(where: str) -> ArtifactError:
    return ArtifactError("has no scales beside its codes, so the quantised weight cannot be read.", code="quantised-parts", where=where, remedy="Get the folder again.")  # fmt: skip


def _forget(model: PreTrainedModel) -> None:
    """What is left is a plain model that holds a few layers of another kind."""
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)


_UNPACK = (
    "Write the values in 16 bits, luthier export SRC DST --to transformers, and take that; or the original weights."
)
