"""Opens a saved model with plain libraries and writes its logits. Run as a script, in a process of its own.

It must not import luthier: what it opens must open for people who don't have it. It reads a request as JSON from the
file named by its first argument:

    {"folder": …, "base": … or null, "texts": [rendered prompts], "messages": [[…], …], "ids": [[…], …],
     "dtype": "float32", "device": "cpu", "attention": "sdpa" or null, "threads": 2, "deterministic": true,
     "trust_remote_code": false, "layered": false, "quantisation": {"precision": "nf4", "skip": ["lm_head"]} or null,
     "dequantise": false, "together": [[adapter's folder, weight], …], "rounding": 0.004 or null, "tokenizer": true, "out": "logits.safetensors"}

and writes one float32 tensor a probe and repetition (``probe0``, ``again0``), the logits without the adapter
(``plain0``) and with adapted weights disturbed by up to the share ``rounding`` (``rounded0``). With ``dequantise`` these are
of the model whose quantised weights transformers replaced by the values they stand for, all of it in ``dtype``, and
``kernel0`` is what it answered before, by the kernels of its quantisation. Beside them it writes ``out + ".json"`` with what
the folder's own tokenizer makes of the messages. Where the model does not fit on the device, its weights stay in host memory and visit the device layer by layer (``layered`` asks for it).
"""

import gc
import json
import os
import sys
from pathlib import Path

QUANTISED = ("Params4bit", "Int8Params")
MARK = "was_quantised"  # on a weight that holds the values of a quantised one


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    if request["deterministic"]:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
    import torch

    torch.set_num_threads(request["threads"])
    torch.use_deterministic_algorithms(request["deterministic"])
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder = Path(request["folder"])
    layered = request["layered"]
    try:
        tensors = logits_of(folder, request, layered)
    except torch.OutOfMemoryError:
        if layered:
            raise
        tensors = None
    if tensors is None:  # outside the handler, whose traceback would keep the model on the device
        gc.collect()
        torch.accelerator.empty_cache()
        layered = True
        tensors = logits_of(folder, request, layered)
    save_file(tensors, request["out"])
    rendered, tokens = [], []
    if request.get("tokenizer", True):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=request["trust_remote_code"]
        )
        rendered, tokens = read_texts(tokenizer, request["messages"], request["texts"])
    answer = {"rendered": rendered, "tokens": tokens, "luthier": "luthier" in sys.modules, "layered": layered}
    Path(request["out"] + ".json").write_text(json.dumps(answer))


def logits_of(folder, request, layered):
    """The model's logits on every probe, twice, and without its adapter."""
    import torch

    tensors = kernel_logits(folder, request, layered) if request.get("dequantise") else {}
    model, is_adapter = open_model(folder, request, layered)
    model.eval()
    with torch.no_grad():
        for number, ids in enumerate(request["ids"]):
            batch = torch.tensor([ids], device=request["device"])
            for name in ("probe", "again"):
                tensors[f"{name}{number}"] = model(input_ids=batch, use_cache=False).logits[0].float().cpu()
            if is_adapter:
                with model.disable_adapter():
                    tensors[f"plain{number}"] = model(input_ids=batch, use_cache=False).logits[0].float().cpu()
        if request.get("rounding") and not layered:  # layered, the weights are not where they could be changed
            disturb(model, request["rounding"])
            for number, ids in enumerate(request["ids"]):
                batch = torch.tensor([ids], device=request["device"])
                tensors[f"rounded{number}"] = model(input_ids=batch, use_cache=False).logits[0].float().cpu()
    return tensors


def kernel_logits(folder, request, layered):
    """The logits of the model whose layers are quantised still; none where transformers has no such layers (fp8)."""
    import torch

    quantisation = request.get("quantisation")
    if quantisation and quantisation["precision"] == "fp8":
        return {}
    model, _ = open_model(folder, {**request, "dequantise": False}, layered)
    in_one_dtype(model, getattr(torch, request["dtype"]))
    model.eval()
    with torch.no_grad():
        batches = [torch.tensor([ids], device=request["device"]) for ids in request["ids"]]
        return {
            f"kernel{number}": model(input_ids=batch, use_cache=False).logits[0].float().cpu()
            for number, batch in enumerate(batches)
        }


def in_one_dtype(model, dtype):
    """Cast what bitsandbytes did not quantise: of its folders transformers leaves that as the files hold it, whatever was asked."""
    if not any(type(weight).__name__ in QUANTISED for weight in model.parameters()):
        return
    for weight in model.parameters():
        if type(weight).__name__ not in QUANTISED and weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def disturb(model, share):
    """Change weights at random by up to ``share``, as rounding does.

    They are those an adapter is put on, and those that were quantised; where there are neither, all matrices.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    known = any("base_layer" in name or hasattr(weight, MARK) for name, weight in model.named_parameters())
    for name, weight in model.named_parameters():
        if ("base_layer" in name or hasattr(weight, MARK)) if known else weight.dim() > 1:
            noise = torch.rand(weight.shape, generator=generator).mul_(2).sub_(1).mul_(share).add_(1)
            weight.mul_(noise.to(weight))


def read_texts(tokenizer, conversations, texts):
    """How a tokenizer's template renders conversations, and how it splits texts; a template's refusal is an answer too."""
    import jinja2

    rendered = []
    for messages in conversations if tokenizer.chat_template else []:
        try:
            rendered.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            rendered.append(f"refused: {error}")
    return rendered, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def open_model(folder, request, layered):
    """What a user would type, and whether it is an adapter; layered, the weights come to the device one layer at a time."""
    if not layered:
        return open_whole(folder, request)
    import torch
    from accelerate import cpu_offload

    model, is_adapter = open_whole(folder, {**request, "device": "cpu"})
    return cpu_offload(model, execution_device=torch.device(request["device"])), is_adapter


def open_whole(folder, request):
    """What a user would type: AutoModelForCausalLM for a model, PeftModel on top of the base for an adapter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        "dtype": getattr(torch, request["dtype"]),
        "device_map": {"": request["device"]} if request["device"] != "cpu" else None,
        "trust_remote_code": request["trust_remote_code"],
    }
    if request["attention"]:
        options["attn_implementation"] = request["attention"]
    quantisation = request.get("quantisation")
    if quantisation and quantisation["precision"] != "fp8":
        options |= {
            "quantization_config": bitsandbytes_config(quantisation, options["dtype"]),
            "device_map": {"": request["device"]},
        }
    if not (folder / "adapter_config.json").is_file():
        if request.get("dequantise") and quantised_by(folder) == "compressed-tensors":
            from transformers import CompressedTensorsConfig

            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        if quantisation and quantisation["precision"] == "fp8":
            round_to_fp8(model, quantisation["skip"])
        return dequantised(model, request, options["dtype"]), False
    from peft import PeftModel

    named = json.loads((folder / "adapter_config.json").read_text())
    base, revision = request["base"] or named["base_model_name_or_path"], named.get("revision") or "main"
    told = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=request["trust_remote_code"])
    if getattr(told, "quantization_config", None):  # which would go to a GPU by itself
        options["device_map"] = {"": request["device"]}
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, **options)
    model = dequantised(model, request, options["dtype"])
    if quantisation and quantisation["precision"] == "fp8":
        round_to_fp8(model, quantisation["skip"])
    model = PeftModel.from_pretrained(model, str(folder))
    if request.get("together"):
        put_together(model, request["together"])
    return model, True


def put_together(model, adapters):
    """Several LoRA adapters active at once, each times its weight; the first of them is there already."""
    names = ["default"]
    for number, (folder, _) in enumerate(adapters[1:], start=1):
        names.append(f"adapter{number}")
        model.load_adapter(folder, adapter_name=names[-1])
    model.base_model.set_adapter(names)
    for module in model.modules():
        if hasattr(module, "set_scale"):  # a layer that has no such adapter leaves it
            for name, (_, weight) in zip(names, adapters):
                module.set_scale(name, weight)


def dequantised(model, request, dtype):
    """The model, where ``dequantise`` asks for it with the values that quantised weights stand for, as transformers gives them."""
    if not request.get("dequantise") or not any(type(weight).__name__ in QUANTISED for weight in model.parameters()):
        return model
    layers = [
        name for name, module in model.named_modules() if type(getattr(module, "weight", None)).__name__ in QUANTISED
    ]
    in_one_dtype(model, dtype)
    model = model.dequantize()
    for name in layers:
        model.get_submodule(name).to(dtype)
    for name in layers:
        setattr(model.get_submodule(name).weight, MARK, True)
    return model


def quantised_by(folder):
    """What a folder's config says its weights are quantised by."""
    told = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    return told.get("quant_method")


def bitsandbytes_config(quantisation, dtype):
    """What a user would pass to open the base in nf4 or int8."""
    from transformers import BitsAndBytesConfig

    skip = quantisation["skip"]
    if quantisation["precision"] == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip
    )


def round_to_fp8(model, skip):
    """Give every linear layer the values that e4m3 with a scale a row leaves of its weights; no plain library does it."""
    import torch

    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name not in skip:
            weight = module.weight.data.float()
            largest = weight.abs().amax(dim=1, keepdim=True)
            scale = torch.where(largest == 0, 1.0, largest / 448)
            setattr(module.weight, MARK, True)
            module.weight.data.copy_((weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)


if __name__ == "__main__":
    main(sys.argv[1])
