"""What other tools call our keys, and how their values read here.

One row a name. ``docs/coming-from.md`` and the hints in errors are both made from this table, by running each row's
converter: they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Converted = dict[str, Any] | str
"""Our keys with values; or a sentence where there is nothing to write."""

Converter = Callable[[Any, Mapping[str, Any]], Converted]
"""Takes the foreign value and the whole mapping it stands in (some names only mean something together)."""

TOOLS = {
    "R": "llama-recipes",
    "P": "PEFT",
    "T": "Trainer, TRL",
    "U": "Unsloth",
    "L": "LLaMA-Factory",
    "A": "Axolotl",
    "N": "torchtune",
}


@dataclass(frozen=True)
class Foreign:
    """A foreign name.

    Attributes:
        name: as the other tool writes it.
        tools: letters of ``TOOLS``.
        example: a value as people write it there.
        convert: gives our keys and values, or a sentence.
    """

    name: str
    tools: str
    example: Any
    convert: Converter


def convert(name: str, value: Any, given: Mapping[str, Any]) -> Converted | None:
    """Translate ``name: value`` out of ``given``; None for a name that no tool we know uses."""
    row = TABLE.get(name)
    if row is None:
        return None
    try:
        return row.convert(value, given)
    except (TypeError, ValueError, AttributeError, KeyError):
        ours = row.convert(row.example, {})
        return ours if isinstance(ours, str) else f"It is {_names(ours)} here; {value!r} can't be converted."


def _names(ours: dict[str, Any]) -> str:
    return " and ".join(f"`{key}`" for key in ours)


def _to(key: str, change: Callable[[Any], Any] = lambda value: value) -> Converter:
    return lambda value, given: {key: change(value)}


def _no(sentence: str) -> Converter:
    return lambda value, given: sentence


def _switch(key: str, on: Any, off: Any) -> Converter:
    return lambda value, given: {key: on if _true(value) else off}


def _words(key: str, table: dict[str, Any], otherwise: str) -> Converter:
    def converter(value: Any, given: Mapping[str, Any]) -> Converted:
        found = table.get(str(value).lower())
        if found is None:
            return f"`{value}` has no counterpart yet; {otherwise}"
        return dict(found) if isinstance(found, dict) else {key: found}

    return converter


def _true(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() not in ("", "false", "no", "none", "off", "0")
    return bool(value)


def _share_or_null(value: Any) -> float | None:
    return float(value) or None if value is not None else None


def _names_of_layers(value: Any) -> Any:
    if isinstance(value, str):
        if value in ("all", "all-linear"):
            return "all-linear"
        return [name.strip() for name in value.split(",")] if "," in value else value
    return list(value)


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    return list(value)


_PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size", "batch_size_training", "batch_size")


def _batch(value: Any, given: Mapping[str, Any]) -> Converted:
    micro, rounds = int(value), int(given.get("gradient_accumulation_steps", 1))
    return {"train.micro_batch": micro, "train.batch_samples": micro * rounds}


def _accumulation(value: Any, given: Mapping[str, Any]) -> Converted:
    micro = next((int(given[name]) for name in _PER_DEVICE if name in given), 1)
    return {"train.batch_samples": micro * int(value)}


def _steps(value: Any, given: Mapping[str, Any]) -> Converted:
    if int(value) <= 0:
        return "Leave it out: the length is `train.epochs`."
    return {"train.steps": int(value)}


def _beta(index: int) -> Converter:
    def converter(value: Any, given: Mapping[str, Any]) -> Converted:
        betas = [float(given.get("adam_beta1", 0.9)), float(given.get("adam_beta2", 0.999))]
        betas[index] = float(value)
        return {"optim.betas": betas}

    return converter


def _ratio_b(value: Any, given: Mapping[str, Any]) -> Converted:
    rate = given.get("learning_rate", given.get("lr"))
    if rate is None:
        return "`optim.lr_b` is B's rate itself here, not a ratio: write ratio × `optim.lr`."
    return {"optim.lr_b": float(f"{float(value) * float(rate):.6g}")}


def _every(key: str) -> Converter:
    def converter(value: Any, given: Mapping[str, Any]) -> Converted:
        number = float(value)
        if 0 < number < 1:
            return f"A share of the run has no counterpart; give `{key}` steps, or epochs as in `{key}: 0.5 epoch`."
        return {key: int(number)}

    return converter


def _per_epoch(key: str) -> Converter:
    return lambda value, given: {key: f"{1 / int(value):g} epoch"}


def _strategy(key: str) -> Converter:
    def converter(value: Any, given: Mapping[str, Any]) -> Converted:
        if str(value).lower() == "epoch":
            return {key: "1 epoch"}
        return f"`{key}` alone says when: a number of steps, or `1 epoch`."

    return converter


def _sources(value: Any, given: Mapping[str, Any]) -> Converted:
    if isinstance(value, list):
        paths = [item["path"] if isinstance(item, Mapping) else str(item) for item in value]
        return {"data.train": paths[0] if len(paths) == 1 else paths}
    if isinstance(value, Mapping):
        return {"data.train": value.get("path") or value.get("source") or value["data_files"]}
    names = _list(value)
    return {"data.train": names[0] if len(names) == 1 else names}


def _eval_source(value: Any, given: Mapping[str, Any]) -> Converted:
    converted = _sources(value, given)
    return {"data.eval": converted["data.train"]} if isinstance(converted, dict) else converted


def _template(value: Any, given: Mapping[str, Any]) -> Converted:
    text = str(value)
    if text == "chatml" or text.endswith((".jinja", ".jinja2")):
        return {"model.template": text}
    return (
        "The tokenizer's own chat template is used: leave it out; where the tokenizer has none, "
        "`model.template` takes `chatml` or a Jinja file."
    )


def _precision(value: Any, given: Mapping[str, Any]) -> Converted:
    names = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16"}
    names |= {"fp32": "fp32", "float32": "fp32", "float": "fp32", "no": "fp32"}
    text = str(value).lower().removeprefix("torch.")
    if text in ("auto", "none"):
        return "Leave it out: `model.precision` is chosen for the device."
    return {"model.precision": names[text]}


def _quantised(value: Any, given: Mapping[str, Any]) -> Converted:
    if isinstance(value, Mapping):
        bits = 4 if _true(value.get("load_in_4bit")) else 8 if _true(value.get("load_in_8bit")) else None
    else:
        bits = {"4": 4, "8": 8}.get(str(value).lower().removesuffix("bit").removesuffix(".0"))
    if not _true(value):
        return "Leave it out: that is the default here."
    if bits is None:
        return "`model.precision` takes nf4, int8 or fp8 for a base that is quantised while it is read."
    return {"model.precision": "nf4" if bits == 4 else "int8"}


def _if_true(then: dict[str, Any] | str, otherwise: str = "Leave it out: that is the default here.") -> Converter:
    return lambda value, given: then if _true(value) else otherwise


def _finetuning_type(value: Any, given: Mapping[str, Any]) -> Converted:
    if str(value) == "full":
        return {"adapter": "none"}
    if str(value) == "freeze":
        return "Freezing parts of the model has no counterpart yet."
    return {"adapter.type": str(value)}


def _report(value: Any, given: Mapping[str, Any]) -> Converted:
    names = [name for name in _list(value) if name not in ("none", "all")]
    if not names:
        return "Leave it out: metrics.jsonl is always written."
    return {"log": names}


_ONE_DEVICE = "A run takes one device so far; leave it out."
_AUTOMATIC = "Leave it out: this is done by itself."
_EVERY_STEP = "Leave it out: every step is written to metrics.jsonl."
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "wsd": "wsd",
    "cosine_with_min_lr": "cosine",
}
_EIGHT_BIT = {"optim.name": "adamw", "optim.states": "8bit"}
_OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adam", "torch.optim.adamw"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "bitsandbytes.optim.adamw8bit"), _EIGHT_BIT),
    "adafactor": "adafactor",
    "muon": "muon",
}
_OPTIMIZER = _words("optim.name", _OPTIMIZERS, "`optim.name` takes adamw, adafactor or muon.")
_SCHEDULE = _words("optim.schedule", _SCHEDULES, "`optim.schedule` takes constant, linear, cosine or wsd.")
_RECOMPUTE = _switch("train.memory", "recompute", "keep")

_ROWS = [
    # model
    Foreign("model_name_or_path", "TL", "org/name", _to("model.path")),
    Foreign("model_name", "RU", "org/name", _to("model.path")),
    Foreign("base_model", "A", "org/name", _to("model.path")),
    Foreign("base_model_name_or_path", "P", "org/name", _to("model.path")),
    Foreign("pretrained_model_name_or_path", "T", "org/name", _to("model.path")),
    Foreign("model_id", "T", "org/name", _to("model.path")),
    Foreign("model_revision", "TL", "main", _to("model.revision")),
    Foreign("torch_dtype", "T", "bfloat16", _precision),
    Foreign("dtype", "TUN", "bf16", _precision),
    Foreign("bf16", "TLA", True, _if_true({"model.precision": "bf16"})),
    Foreign("fp16", "TLA", True, _if_true({"model.precision": "fp16"})),
    Foreign("use_fp16", "R", True, _if_true({"model.precision": "fp16"})),
    Foreign("mixed_precision", "RT", "bf16", _precision),
    Foreign("pure_bf16", "RL", True, _if_true({"model.precision": "bf16", "optim.master": "none"})),
    Foreign("tf32", "TA", True, _no("TF32 has no counterpart: it would be one more thing that decides bits.")),
    Foreign("load_in_4bit", "TUA", True, _if_true({"model.precision": "nf4"})),
    Foreign("load_in_8bit", "TUA", True, _if_true({"model.precision": "int8"})),
    Foreign("quantization", "R", "4bit", _quantised),
    Foreign("quantization_bit", "L", 4, _quantised),
    Foreign("quantization_config", "T", {"load_in_4bit": True}, _quantised),
    Foreign("attn_implementation", "TUA", "sdpa", _to("model.attention")),
    Foreign("flash_attention", "A", True, _if_true({"model.attention": "flash_attention_2"})),
    Foreign(
        "flash_attn",
        "L",
        "fa2",
        _words(
            "model.attention",
            {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"},
            "`model.attention` takes the names of transformers.",
        ),
    ),
    Foreign("sdp_attention", "A", True, _if_true({"model.attention": "sdpa"})),
    Foreign("use_fast_kernels", "R", True, _if_true({"model.attention": "sdpa"})),
    Foreign("chat_template", "TUA", "chatml", _template),
    Foreign("template", "L", "llama3", _template),
    Foreign("add_special_tokens", "L", "<a>,<b>", _to("model.new_tokens", _list)),
    Foreign("resize_vocab", "L", True, _no("The vocabulary is resized by itself when `model.new_tokens` are given.")),
    # adapter
    Foreign("use_peft", "RT", True, _switch("adapter", "lora", "none")),
    Foreign("peft_method", "R", "lora", _to("adapter.type")),
    Foreign("peft_type", "P", "LORA", _to("adapter.type", lambda value: str(value).lower())),
    Foreign("finetuning_type", "L", "full", _finetuning_type),
    Foreign("r", "PU", 16, _to("adapter.r")),
    Foreign("lora_r", "TA", 16, _to("adapter.r")),
    Foreign("lora_rank", "LN", 16, _to("adapter.r")),
    Foreign("rank", "N", 16, _to("adapter.r")),
    Foreign("lora_alpha", "PTULAN", 32, _to("adapter.alpha")),
    Foreign("lora_dropout", "PTULAN", 0.05, _to("adapter.dropout")),
    Foreign("target_modules", "PU", ["q_proj", "v_proj"], _to("adapter.target", _names_of_layers)),
    Foreign("lora_target_modules", "TA", ["q_proj", "v_proj"], _to("adapter.target", _names_of_layers)),
    Foreign("lora_target", "L", "all", _to("adapter.target", _names_of_layers)),
    Foreign("lora_attn_modules", "N", ["q_proj", "v_proj"], _to("adapter.target", _names_of_layers)),
    Foreign("lora_target_linear", "A", True, _if_true({"adapter.target": "all-linear"})),
    Foreign("exclude_modules", "P", ["lm_head"], _to("adapter.exclude")),
    Foreign("modules_to_save", "PU", ["embed_tokens", "lm_head"], _to("adapter.modules_to_save", _list)),
    Foreign("lora_modules_to_save", "TA", ["embed_tokens", "lm_head"], _to("adapter.modules_to_save", _list)),
    Foreign("additional_target", "L", "embed_tokens,lm_head", _to("adapter.modules_to_save", _list)),
    Foreign("use_rslora", "PTUL", True, _to("adapter.rslora", _true)),
    Foreign("peft_use_rslora", "A", True, _to("adapter.rslora", _true)),
    Foreign("use_dora", "PTLN", True, _to("adapter.dora", _true)),
    Foreign("peft_use_dora", "A", True, _to("adapter.dora", _true)),
    Foreign("init_lora_weights", "PU", "pissa", _to("adapter.init_lora_weights")),
    Foreign("bias", "PU", "none", _to("adapter.bias")),
    Foreign("task_type", "P", "CAUSAL_LM", _no("Leave it out: it follows from `method`.")),
    Foreign("inference_mode", "P", False, _no(_AUTOMATIC)),
    Foreign(
        "adapter_name_or_path", "L", "saves/lora", _no("Going on from an existing adapter has no counterpart yet.")
    ),
    Foreign("lora_model_dir", "A", "out", _no("Going on from an existing adapter has no counterpart yet.")),
    # optim
    Foreign("learning_rate", "TULA", 1e-4, _to("optim.lr", float)),
    Foreign("lr", "RN", 1e-4, _to("optim.lr", float)),
    Foreign("lr_scheduler_type", "TUL", "cosine", _SCHEDULE),
    Foreign("lr_scheduler", "A", "cosine", _SCHEDULE),
    Foreign("warmup_ratio", "TULA", 0.03, _to("optim.warmup", float)),
    Foreign("warmup_steps", "TULA", 100, _to("optim.warmup", float)),
    Foreign("num_warmup_steps", "TN", 100, _to("optim.warmup", float)),
    Foreign("cosine_min_lr_ratio", "A", 0.1, _to("optim.min_lr", float)),
    Foreign("weight_decay", "TULAR", 0.01, _to("optim.weight_decay", float)),
    Foreign("max_grad_norm", "TULA", 1.0, _to("optim.clip", _share_or_null)),
    Foreign("clip_grad_norm", "N", 1.0, _to("optim.clip", _share_or_null)),
    Foreign("gradient_clipping", "R", True, _switch("optim.clip", 1.0, None)),
    Foreign("gradient_clipping_threshold", "R", 1.0, _to("optim.clip", _share_or_null)),
    Foreign("adam_beta1", "TLA", 0.9, _beta(0)),
    Foreign("adam_beta2", "TLA", 0.95, _beta(1)),
    Foreign("adam_epsilon", "TLA", 1e-8, _to("optim.eps", float)),
    Foreign("optim", "TUL", "adamw_8bit", _OPTIMIZER),
    Foreign(
        "optimizer",
        "ARN",
        "adamw_torch",
        lambda value, given: _OPTIMIZER(value.get("_component_") if isinstance(value, Mapping) else value, given),
    ),
    Foreign("loraplus_lr_ratio", "LA", 16, _ratio_b),
    Foreign("embedding_learning_rate", "U", 1e-5, _to("optim.lr_embeddings", float)),
    Foreign("embedding_lr", "A", 1e-5, _to("optim.lr_embeddings", float)),
    Foreign("neftune_noise_alpha", "TULA", 5, _no("Noise on embeddings has no counterpart.")),
    Foreign("label_smoothing_factor", "T", 0.1, _no("Label smoothing has no counterpart.")),
    # train
    Foreign("num_train_epochs", "TUL", 3, _to("train.epochs")),
    Foreign("num_epochs", "RA", 3, _to("train.epochs")),
    Foreign("epochs", "N", 3, _to("train.epochs")),
    Foreign("max_steps", "TULA", 1000, _steps),
    Foreign("per_device_train_batch_size", "TUL", 4, _batch),
    Foreign("micro_batch_size", "A", 4, _batch),
    Foreign("batch_size_training", "R", 4, _batch),
    Foreign("batch_size", "N", 4, _batch),
    Foreign("gradient_accumulation_steps", "TULARN", 8, _accumulation),
    Foreign("per_device_eval_batch_size", "TUL", 4, _no("Evaluation takes rows of `train.micro_batch`.")),
    Foreign("val_batch_size", "R", 4, _no("Evaluation takes rows of `train.micro_batch`.")),
    Foreign("eval_batch_size", "A", 4, _no("Evaluation takes rows of `train.micro_batch`.")),
    Foreign("max_seq_length", "TU", 2048, _to("train.max_length", int)),
    Foreign("max_length", "T", 2048, _to("train.max_length", int)),
    Foreign("max_seq_len", "N", 2048, _to("train.max_length", int)),
    Foreign("model_max_length", "T", 2048, _to("train.max_length", int)),
    Foreign("cutoff_len", "L", 2048, _to("train.max_length", int)),
    Foreign("sequence_len", "A", 2048, _to("train.max_length", int)),
    Foreign("context_length", "R", 2048, _to("train.max_length", int)),
    Foreign("packing", "TUL", True, _to("train.packing", _true)),
    Foreign("sample_packing", "A", True, _to("train.packing", _true)),
    Foreign("packed", "N", True, _to("train.packing", _true)),
    Foreign("batching_strategy", "R", "packing", lambda value, given: {"train.packing": value == "packing"}),
    Foreign("pad_to_sequence_len", "A", True, _no("Leave it out: rows are as long as their samples.")),
    Foreign("group_by_length", "TA", True, _no("Leave it out: without packing, batches are grouped by length.")),
    Foreign("seed", "TULARN", 42, _to("train.seed")),
    Foreign("random_state", "U", 3407, _to("train.seed")),
    Foreign("data_seed", "T", 42, _to("train.seed")),
    Foreign("gradient_checkpointing", "TLA", True, _RECOMPUTE),
    Foreign("use_gradient_checkpointing", "U", "unsloth", _RECOMPUTE),
    Foreign("enable_activation_checkpointing", "N", True, _RECOMPUTE),
    Foreign("torch_compile", "TA", True, _to("train.compile", _true)),
    Foreign("full_determinism", "T", True, _to("train.deterministic", _true)),
    Foreign("stage", "L", "sft", _words("method", {"sft": "sft", "pt": "pretrain"}, "`method` takes sft or pretrain.")),
    Foreign("rl", "A", "dpo", _no("Preference training has no counterpart yet; `method` takes sft or pretrain.")),
    Foreign("do_train", "TL", True, _no("Leave it out: `luthier train` trains.")),
    Foreign("do_eval", "TL", True, _no("Leave it out: it is evaluated when `data.eval` is given.")),
    # data
    Foreign("dataset", "LRN", "data.jsonl", _sources),
    Foreign("datasets", "A", [{"path": "data.jsonl", "type": "alpaca"}], _sources),
    Foreign("dataset_name", "T", "org/name", _sources),
    Foreign("dataset_path", "T", "data.jsonl", _sources),
    Foreign("data_path", "T", "data.jsonl", _sources),
    Foreign("train_file", "T", "data.jsonl", _sources),
    Foreign("validation_file", "T", "held-out.jsonl", _eval_source),
    Foreign("eval_dataset", "L", "held-out.jsonl", _eval_source),
    Foreign("test_datasets", "A", [{"path": "held-out.jsonl"}], _eval_source),
    Foreign("val_size", "L", 0.05, _to("data.eval")),
    Foreign("val_set_size", "A", 0.05, _to("data.eval")),
    Foreign("test_size", "T", 0.05, _to("data.eval")),
    Foreign("max_samples", "L", 1000, _to("data.train.limit", int)),
    Foreign("train_on_inputs", "A", True, _switch("data.train_on", "all", "assistant")),
    Foreign("train_on_input", "N", True, _switch("data.train_on", "all", "assistant")),
    Foreign("train_on_prompt", "L", True, _switch("data.train_on", "all", "assistant")),
    Foreign("mask_history", "L", True, _switch("data.train_on", "last", "assistant")),
    Foreign("assistant_only_loss", "T", True, _switch("data.train_on", "assistant", "all")),
    Foreign("completion_only_loss", "T", True, _switch("data.train_on", "assistant", "all")),
    Foreign("dataset_text_field", "TU", "text", lambda value, given: {"data.columns": {"text": value}}),
    Foreign("dataset_num_proc", "TU", 4, _no(_AUTOMATIC)),
    Foreign("preprocessing_num_workers", "L", 4, _no(_AUTOMATIC)),
    Foreign("dataloader_num_workers", "TLA", 4, _no(_AUTOMATIC)),
    Foreign("remove_unused_columns", "T", False, _no(_AUTOMATIC)),
    Foreign("shuffle", "N", True, _no("Leave it out: the order is a permutation made from `train.seed`.")),
    # evaluate
    Foreign(
        "run_validation", "R", True, _if_true({"data.eval": 0.02}, "Leave `data.eval` out: nothing is evaluated then.")
    ),
    Foreign("eval_steps", "TULA", 200, _every("evaluate.every")),
    Foreign("eval_strategy", "TUL", "epoch", _strategy("evaluate.every")),
    Foreign("evaluation_strategy", "T", "epoch", _strategy("evaluate.every")),
    Foreign("evals_per_epoch", "A", 4, _per_epoch("evaluate.every")),
    Foreign("early_stopping_patience", "TA", 3, _to("evaluate.patience", int)),
    # checkpoint
    Foreign("save_steps", "TULA", 200, _every("checkpoint.every")),
    Foreign("save_strategy", "TULA", "epoch", _strategy("checkpoint.every")),
    Foreign("saves_per_epoch", "A", 2, _per_epoch("checkpoint.every")),
    Foreign("save_total_limit", "TULA", 2, _to("checkpoint.keep", int)),
    Foreign("load_best_model_at_end", "TL", True, _if_true({"checkpoint.best": "eval_loss"})),
    Foreign(
        "metric_for_best_model",
        "TL",
        "eval_loss",
        _words(
            "checkpoint.best", {"eval_loss": "eval_loss", "loss": "eval_loss"}, "`checkpoint.best` takes eval_loss."
        ),
    ),
    Foreign("save_only_model", "TL", True, _no("A checkpoint always holds all that resuming needs.")),
    Foreign("save_model", "R", True, _no("Leave it out: the model is always saved.")),
    Foreign("save_optimizer", "R", True, _no("Leave it out: the optimiser is in every checkpoint.")),
    Foreign("save_safetensors", "TA", True, _no("Leave it out: nothing else is written.")),
    Foreign(
        "resume_from_checkpoint", "TLAN", True, _no("`luthier resume RUN` goes on from the newest whole checkpoint.")
    ),
    Foreign("overwrite_output_dir", "TL", True, _no("Nothing is overwritten: give another `output`.")),
    # output and logs
    Foreign("output_dir", "TULARN", "out", _to("output")),
    Foreign("dist_checkpoint_root_folder", "R", "out", _to("output")),
    Foreign("logging_steps", "TULA", 10, _no(_EVERY_STEP)),
    Foreign("log_every_n_steps", "N", 1, _no(_EVERY_STEP)),
    Foreign("logging_dir", "T", "logs", _no("Leave it out: logs are in the run folder.")),
    Foreign("plot_loss", "L", True, _no("Leave it out: report.html has the curves.")),
    Foreign("report_to", "TUL", "wandb", _report),
    Foreign("use_wandb", "R", True, _if_true({"log": ["wandb"]})),
    Foreign("wandb_project", "A", "name", _no("`log: [wandb]`; its project is set as Weights & Biases documents it.")),
    Foreign("push_to_hub", "T", True, _no("`push: OWNER/NAME` uploads the proven result.")),
    Foreign("hub_model_id", "TA", "me/my-model", _to("push.id")),
    Foreign("hub_private_repo", "T", True, _no("`push: {id: OWNER/NAME, private: true}`; private is the default.")),
    Foreign("hub_strategy", "T", "every_save", _no("`push` uploads once, after the proof.")),
    Foreign("hub_token", "T", "…", _no("Leave it out, and out of every file: `hf auth login`, or HF_TOKEN.")),
    # devices
    Foreign("enable_fsdp", "R", True, _no(_ONE_DEVICE)),
    Foreign("fsdp", "TLA", "full_shard", _no(_ONE_DEVICE)),
    Foreign("fsdp_config", "TLAR", {}, _no(_ONE_DEVICE)),
    Foreign("low_cpu_fsdp", "R", True, _no(_ONE_DEVICE)),
    Foreign("deepspeed", "TLA", "ds.json", _no(_ONE_DEVICE)),
    Foreign("ddp_timeout", "TL", 1800, _no(_ONE_DEVICE)),
    Foreign("use_liger_kernel", "T", True, _no("Choosing kernels by hand has no counterpart.")),
]

TABLE: dict[str, Foreign] = {row.name: row for row in _ROWS}
