"""Opens a saved model with plain libraries and writes its logits. Run as a script, in a process of its own.

It must not import luthier: what it opens must open for people who don't have it. It reads a request as JSON from the
file named by its first argument:

    {"folder": …, "base": … or null, "texts": [rendered prompts], "messages": [[…], …], "ids": [[…], …],
     "dtype": "float32", "device": "cpu", "attention": "sdpa" or null, "threads": 2, "deterministic": true,
     "trust_remote_code": false, "layered": false, "quantisation": {"precision": "nf4", "skip": ["lm_head"]} or null, "rounding": 0.004 or null, "tokenizer": true, "out": "logits.safetensors"}

and writes one float32 tensor a probe and repetition (``probe0``, ``again0``), the logits without the adapter
(``plain0``) and with adapted weights disturbed by up to the share ``rounding`` (``rounded0``), and beside them
``out + ".json"`` with what the folder's own tokenizer makes of the messages. Where the model does not fit on the device, its
weights stay in host memory and visit the device layer by layer (``layered`` asks for it).
"""

import gc
import json
import os
import sys
from pathlib import Path


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

    model, is_adapter = open_model(folder, request, layered)
    model.eval()
    tensors = {}
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


def disturb(model, share):
    """Change weights at random by up to ``share``, as rounding does: those an adapter is put on, without one all matrices."""
    import torch

    generator = torch.Generator().manual_seed(0)
    adapted = any("base_layer" in name for name, _ in model.named_parameters())
    for name, weight in model.named_parameters():
        if "base_layer" in name if adapted else weight.dim() > 1:
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
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options), False
    from peft import PeftModel

    named = json.loads((folder / "adapter_config.json").read_text())
    base, revision = request["base"] or named["base_model_name_or_path"], named.get("revision") or "main"
    told = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=request["trust_remote_code"])
    if getattr(told, "quantization_config", None):  # which would go to a GPU by itself
        options["device_map"] = {"": request["device"]}
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, **options)
    if quantisation and quantisation["precision"] == "fp8":
        round_to_fp8(model, quantisation["skip"])
    return PeftModel.from_pretrained(model, str(folder)), True


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
            module.weight.data.copy_((weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)


if __name__ == "__main__":
    main(sys.argv[1])
