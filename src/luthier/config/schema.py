"""The run file as types: every key, its unit, its default and one line about it.

Nothing here imports torch, and nothing here looks at a disk. Reading a file, overrides and hints live in
``config.read``; what may differ between a run and its resumption lives in ``config.compare``.

A default of ``None`` means "chosen when the run starts", from the model, the data or the device; the choice is
written into the run folder's ``run.yaml``, so that a resumed run makes no choice again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from luthier.config.hub_id import wrong_id

FORMAT: Literal[1] = 1
Precision = Literal["bf16", "fp16", "fp32", "nf4", "int8", "fp8"]
QUANTISED = ("nf4", "int8", "fp8")
"""Precisions of a frozen base, on which an adapter trains."""


Real = float
Whole = int


def three_words(path: str) -> str:
    """What can be done with an adapter that was trained before, as lines that can be pasted."""
    return (
        f"Write one of: adapter: {{from: {path}, then: continue}} (trains it further); "
        f"adapter: {{from: {path}, then: stack, type: lora, r: 8}} (it stays as it is, a new one on top); "
        f"adapter: {{from: {path}, then: merge, type: lora, r: 8}} (it is folded into the base first)."
    )


class Section(BaseModel):
    """One block of the run file: unknown keys are errors, and values are checked when they are set."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_assignment=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        serialize_by_alias=True,
    )


class ModelConfig(Section):
    """Which model is trained, and in which precision it is held."""

    path: str = ""
    """A folder in transformers format, a GGUF file, or a hub id. May be left out with `adapter.from`: the base of that adapter."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    precision: Precision | None = None
    """Dtype of the weights as held for computing and as saved. Unset: bf16 on a GPU that has it, else fp16; fp32 on a CPU. nf4, int8 and fp8 hold a frozen base under an adapter ([quantised.md](quantised.md))."""
    keep_16bit: list[str] = []
    """With a quantised precision: layers that stay in 16 bits beside head, embeddings, norms and routers, by name or ending of a name."""
    fp8: Literal["compute", "storage"] = "compute"
    """With precision fp8: multiply in fp8 where the device can, or hold the weights in it and multiply in 16 bits."""
    template: str | None = None
    """Chat template to use instead of the tokenizer's own: `chatml`, or a path to a Jinja file."""
    attention: str | None = None
    """Attention implementation as transformers names it (`sdpa`, `eager`, `flash_attention_2`, `flex_attention`). Unset: transformers' choice."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along. Off unless asked for."""
    new_tokens: list[str] = []
    """Tokens to add to the vocabulary; their embedding rows are trained."""
    dropout: Annotated[Real, Field(ge=0, lt=1)] | None = None
    """Overrides the model's own dropout rates (attention, hidden, residual) for training."""


class SourceConfig(Section):
    """One place that samples come from."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .tsv, .txt, each also as .gz; .parquet), a folder or glob of them, or a hub data set's id."""
    weight: Annotated[Real, Field(gt=0)] | None = None
    """Share of this source in a mixture, in samples, relative to the others; 1 where only others give one. None given: every source is seen once an epoch."""
    limit: Annotated[Whole, Field(gt=0)] | None = None
    """Use at most this many samples, the first ones."""
    split: str = "train"
    """Split of a hub data set."""
    name: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""


Source = Annotated[str, Field(min_length=1)] | SourceConfig
Sources = Source | Annotated[list[Source], Field(min_length=1)]


class DataConfig(Section):
    """What the model is trained on."""

    train: Sources
    """Where the samples come from: a file, folder, glob or hub id, or a list of these or of {path, weight, limit}."""
    eval: Annotated[Real, Field(ge=0, lt=1)] | Sources | None = None
    """Held-out samples: a share of `train` (0.02), or a source of their own."""
    columns: dict[str, str] = {}
    """Maps our field names to the file's columns, e.g. {prompt: question, completion: answer} or {messages: dialog}."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are trained: every assistant turn with its end token, only the last one, or all."""
    too_long: Literal["truncate", "drop", "split"] | None = None
    """What happens to samples longer than `train.max_length`. Unset: `truncate` for `sft`, `split` for `pretrain`."""
    on_bad: Literal["error", "skip"] = "error"
    """What happens to a broken sample: stop with file and line, or skip and report the number."""
    encoding: str | None = None
    """Text encoding of the files, e.g. gb18030. Unset: UTF-8; anything else is detected and named in the error."""


class AdapterConfig(Section):
    """The adapter to train. Keys of peft's own config for the chosen type are accepted beside these."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, validate_assignment=True)

    start: Annotated[str, Field(min_length=1)] | None = Field(default=None, alias="from")
    """An adapter that was trained before, to start from: a run (its final/; RUN@best, RUN@newest), a checkpoint, or any adapter folder. Needs `then`."""
    then: Literal["continue", "stack", "merge"] | None = None
    """What becomes of `from`: `continue` trains the same adapter further, `stack` leaves it as it is below a new one, `merge` folds it into the base first."""
    type: str = "lora"
    """A peft method by its name in lower case: lora, loha, lokr, ia3, vera, oft, …"""
    r: Annotated[Whole, Field(gt=0)] = 16
    """Rank."""
    alpha: Annotated[Real, Field(gt=0)] | None = None
    """Scale: the update is multiplied by alpha / r. Unset: 2 × r."""
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input. The model's own is `model.dropout`."""
    target: str | list[str] = "all-linear"
    """Which layers: `all-linear` (routers and the head left out), names, or a regular expression."""
    exclude: str | list[str] | None = None
    """Layers to leave out of `target`: names, or a regular expression."""
    modules_to_save: list[str] = []
    """Modules trained and saved whole beside the adapter, e.g. [embed_tokens, lm_head]."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""

    @model_serializer(mode="wrap")
    def _given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what was given or chosen: the default of a key that a method lacks would read like a wish for it."""
        given = {self._written(name) for name in self.model_fields_set}
        return {name: value for name, value in write(self).items() if name == "type" or name in given}

    def whole(self) -> dict[str, Any]:
        """Every key as the run file writes it, with its value or its default."""
        return {self._written(name): value for name, value in self}

    @classmethod
    def _written(cls, name: str) -> str:
        field = cls.model_fields.get(name)
        return field.alias if field is not None and field.alias else name


class OptimConfig(Section):
    """How weights are updated."""

    start: Literal["fresh", "carried"] = Field(default="fresh", alias="from")
    """With `adapter.then: continue`: a fresh optimiser, or the moments carried over from the checkpoint of `adapter.from`."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """Optimiser. `muon` trains the matrices of full fine-tuning and leaves the rest to AdamW."""
    lr: Annotated[Real, Field(gt=0)] | None = None
    """Peak learning rate. Unset: 2e-4 with an adapter, 1e-5 without."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate over the run, after warm-up. `wsd` holds it, then falls linearly over the last fifth."""
    warmup: Annotated[Real, Field(ge=0)] = 0.03
    """Warm-up: a share of all steps below 1, a number of steps from 1 on."""
    min_lr: Annotated[Real, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end of the schedule, as a share of `lr`."""
    clip: Annotated[Real, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; `null` for no clipping."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Weight decay; norms and biases are left out."""
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    lr_b: Annotated[Real, Field(gt=0)] | None = None
    """Separate rate for LoRA's B matrices (LoRA+, arXiv:2402.12354)."""
    lr_embeddings: Annotated[Real, Field(gt=0)] | None = None
    """Separate rate for embeddings and head."""
    master: Literal["fp32", "none"] = "fp32"
    """Keep fp32 copies of 16-bit weights that are trained; updates below 16-bit resolution are lost without."""
    states: Literal["32bit", "8bit"] = "32bit"
    """Precision of AdamW's states; `8bit` needs bitsandbytes."""


class TrainConfig(Section):
    """How long, in which portions, and from which seed."""

    epochs: Annotated[Real, Field(gt=0)] | None = None
    """Passes over the data. Unset, and no `steps`: 1."""
    steps: Annotated[Whole, Field(gt=0)] | None = None
    """Number of optimiser steps, instead of `epochs`."""
    batch_tokens: Annotated[Whole, Field(gt=0)] | None = None
    """Tokens per optimiser step. Unset, and no `batch_samples`: 16 samples."""
    batch_samples: Annotated[Whole, Field(gt=0)] | None = None
    """Samples per optimiser step, instead of `batch_tokens`."""
    micro_batch: Annotated[Whole, Field(gt=0)] = 1
    """Rows computed at once: packs of up to `max_length` tokens, or samples without packing. Part of the result's bits."""
    max_length: Annotated[Whole, Field(gt=1)] | None = None
    """Longest row in tokens. Unset: 2048, or the model's own limit if that is shorter."""
    packing: bool = True
    """Put several samples into one row; none sees another."""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """The only source of randomness."""
    memory: Literal["keep", "recompute"] = "keep"
    """Keep activations for the backward pass, or recompute them layer by layer (gradient checkpointing)."""
    compile: bool = False
    """Compile the model's layers one by one with torch.compile."""
    deterministic: bool = True
    """Only kernels whose result does not vary. `false` permits faster ones; resuming is then not bit for bit."""
    nan_limit: Annotated[Whole, Field(ge=1)] = 5
    """Stop after this many steps in a row whose loss or gradient was not finite; each of them is skipped."""

    @model_validator(mode="after")
    def _one_of_each(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("train.epochs and train.steps exclude each other; keep one of them.")
        if self.batch_tokens is not None and self.batch_samples is not None:
            raise ValueError("train.batch_tokens and train.batch_samples exclude each other; keep one of them.")
        return self


def _whole(value: Any) -> Any:
    """Read ``1e3`` steps as a whole number; a text with a unit stays what it is."""
    if isinstance(value, bool):
        raise ValueError(f"a number of steps is needed, not {str(value).lower()}.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if number.is_integer() else value


Interval = Annotated[int | str, BeforeValidator(_whole)]


def _check_interval(value: int | str | None, key: str) -> None:
    if isinstance(value, str):
        count, _, unit = value.partition(" ")
        if unit not in ("epoch", "epochs") or not _is_positive(count):
            raise ValueError(f'{key} is a number of steps, or "1 epoch"; got {value!r}.')
    elif value is not None and value < 1:
        raise ValueError(f"{key} must be at least 1 step; got {value}.")


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


class EvaluateConfig(Section):
    """What is measured on held-out data, and when."""

    every: Interval | None = None
    """Steps between evaluations, or "1 epoch". Unset: once an epoch and at the end, where there is held-out data."""
    generate: Annotated[Whole, Field(ge=0)] = 0
    """Held-out samples to generate answers for at each evaluation."""
    max_new_tokens: Annotated[Whole, Field(gt=0)] = 128
    """Longest generated answer, in tokens."""
    metrics: list[str] = []
    """Metrics on generated answers: `exact`, `json`, or `module:function` taking (answer, reference) and returning a number."""
    patience: Annotated[Whole, Field(gt=0)] | None = None
    """Stop after this many evaluations in a row without a better `eval_loss`."""

    @field_validator("every")
    @classmethod
    def _interval(cls, every: Interval | None) -> Interval | None:
        _check_interval(every, "evaluate.every")
        return every


class CheckpointConfig(Section):
    """When state is saved, and what is kept."""

    every: Interval | None = None
    """Steps between checkpoints, or "1 epoch". Unset: ten times a run and at least once an epoch."""
    keep: Annotated[Whole, Field(ge=1)] = 2
    """How many of the newest checkpoints stay."""
    keep_every: Annotated[Whole, Field(gt=0)] | None = None
    """Checkpoints at multiples of this step stay for good."""
    best: Literal["eval_loss"] | None = None
    """Keep the checkpoint with the best value of this as well; opened as RUN@best."""

    @field_validator("every")
    @classmethod
    def _interval(cls, every: Interval | None) -> Interval | None:
        _check_interval(every, "checkpoint.every")
        return every


class PushConfig(Section):
    """Where on the hub the proven result goes. A push that fails is said, and never fails the run."""

    id: str
    """The repository, OWNER/NAME; made where it does not exist."""
    private: bool = True
    """Make it private. `false` is also needed for a repository that is public already."""
    revision: str | None = None
    """A branch, made where it does not exist; left out, the main one."""
    base: str | None = None
    """What the base under an adapter is called on the hub, where `model.path` is a path."""

    @field_validator("id", "base")
    @classmethod
    def _is_an_id(cls, value: str | None) -> str | None:
        if value is not None and wrong_id(value):
            raise ValueError(wrong_id(value))
        return value


def _push_short_form(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def _model_short_form(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _adapter_short_form(value: Any) -> Any:
    if isinstance(value, str):
        return None if value.lower() == "none" else {"type": value}
    return value


class RunConfig(Section):
    """A run file: one model, one data set, one way of training, one output folder."""

    format: Literal[1] = FORMAT
    """Version of the run file's format."""
    model: Annotated[ModelConfig, BeforeValidator(_model_short_form, json_schema_input_type=ModelConfig | str)] = (
        ModelConfig()
    )
    """A path or hub id, or {path, revision, precision, template, …}. May be left out with `adapter.from`."""
    data: DataConfig
    """What the model is trained on."""
    method: Literal["sft", "pretrain"] = "sft"
    """`sft` trains on the answers of conversations; `pretrain` on every token of plain text."""
    adapter: Annotated[
        AdapterConfig | None,
        BeforeValidator(_adapter_short_form, json_schema_input_type=AdapterConfig | str | None),
    ] = None
    """The adapter to train, or its type alone (`lora`); `none`, or left out: full fine-tuning."""
    optim: OptimConfig = OptimConfig()
    """How weights are updated."""
    train: TrainConfig = TrainConfig()
    """How long, in which portions, and from which seed."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on held-out data, and when."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is saved, and what is kept."""
    output: str = Field(min_length=1)
    """Folder of the run."""
    log: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Loggers beside metrics.jsonl, if they are installed."""
    callbacks: list[str] = []
    """Functions of yours as `module:function`, called with an event at start, step, evaluation, checkpoint and end."""
    push: Annotated[PushConfig | None, BeforeValidator(_push_short_form, json_schema_input_type=PushConfig | str | None)] = None  # fmt: skip
    """Upload the proven result to the hub: OWNER/NAME, or {id, private, revision, base} ([export.md](export.md#to-the-hub)). With `stages` the last one's."""
    stages: list[dict[str, Any]] = []
    """A chain of runs in one file: each item's keys are laid over the others of the file; `name` names it ([stages.md](stages.md))."""

    @model_validator(mode="after")
    def _start_is_whole(self) -> RunConfig:
        start, then = (self.adapter.start, self.adapter.then) if self.adapter else (None, None)
        if start and not then:
            raise ValueError(f"adapter.from is {start}, and adapter.then is missing. {three_words(start)}")
        if then and not start:
            raise ValueError(f"adapter.then is {then}, and adapter.from is missing. {three_words('runs/stage1')}")
        if self.optim.start == "carried" and then != "continue":
            raise ValueError(
                "optim.from carried keeps the moments of the adapter that is trained further; it needs adapter.from "
                "with adapter.then: continue."
            )
        return self

    @model_validator(mode="after")
    def _quantised_base_is_under_an_adapter(self) -> RunConfig:
        precision = self.model.precision
        if precision in QUANTISED and self.adapter is None:
            raise ValueError(
                f"model.precision {precision} holds codes, which no gradient changes, so an adapter has to train on them. "
                "Write adapter: lora, or take bf16 for full fine-tuning."
            )
        if precision in QUANTISED and self.adapter is not None and self.adapter.type.lower() != "lora":
            raise ValueError(
                f"adapter.type {self.adapter.type} has no form for a base in {precision}; take lora (also with dora: true), or model.precision bf16."
            )
        if precision not in QUANTISED and self.model.keep_16bit:
            raise ValueError(
                "model.keep_16bit names layers of a quantised base, and model.precision is none of nf4, int8, fp8."
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> RunConfig:
        if self.optim.name == "muon" and self.adapter is not None:
            raise ValueError(
                "optim.name muon trains the matrices of full fine-tuning; with an adapter take adamw or adafactor."
            )
        if self.optim.states == "8bit" and self.optim.name != "adamw":
            raise ValueError(f"optim.states 8bit are AdamW's; optim.name is {self.optim.name}. Take adamw, or 32bit.")
        return self
