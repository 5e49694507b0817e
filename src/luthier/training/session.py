"""The parts of a run, made in order: data, model, optimiser, checkpoints; everything that training then works with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from luthier.artifacts import fingerprint
from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import readable_size, replace_file
from luthier.artifacts.manifest import versions
from luthier.artifacts.run_folder import Found
from luthier.checkpoint.checkpoints import Checkpoints, read_state
from luthier.config import compare
from luthier.config.read import read_resolved, write_run
from luthier.config.schema import ModelConfig, RunConfig
from luthier.data.batches import Batches
from luthier.data.prepare import Prepared, prepare, repeats
from luthier.errors import RequestError
from luthier.models import adapters, stack
from luthier.models.base_files import is_plain
from luthier.models.memory import recompute
from luthier.models.open import (  # fmt: skip
    Base,
    BaseSource,
    Vocabulary,
    locate_base,
    open_base,
    open_config,
    open_vocabulary,
)
from luthier.models.precision import dtype_of, form_of, unquantised
from luthier.models.quantised.choose import Choice, quantisation_of
from luthier.models.quantised.existing import check_request, is_existing
from luthier.models.saved_adapter import fit_vocabulary, open_adapter
from luthier.report.metrics import MetricsLog
from luthier.training import base_folder, numerics, optimizers, schedule
from luthier.training.events import Events
from luthier.training.loop import Parts
from luthier.training.measure import Measurer
from luthier.training.rehearsal import rehearse_packing, rehearse_saving, rehearse_vocabulary
from luthier.training.resolve import after_data, before_data
from luthier.training.stage import Origin, other_base
from luthier.training.state import seed_of

Say = Callable[[str], None]


class Session:
    """Makes the parts of one run.

    ``start`` is the checkpoint to go on from, None for a fresh run; ``origin`` the adapter that a fresh stage starts from.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        device: torch.device,
        start: Found | None,
        allow: Collection[str],
        say: Say,
        origin: Origin | None = None,
    ) -> None:
        self.origin = origin
        self.then = manifests.read(start.path).facts if start else {}
        self.config, self.run, self.device, self.start, self.allow, self.say = config, run, device, start, allow, say
        self.extra: dict[str, Any] = read_state(start.path)["extra"] if start else {}
        self.notes: list[str] = list(origin.notes) if origin else []
        self._vocabulary: Vocabulary | None = None
        self._choice: Choice | None = None

    def data(self) -> tuple[Prepared, Batches, int]:
        """Everything that can be wrong with the request is found here, before weights are read."""
        base_config = open_config(self._model_config())
        if is_existing(base_config):
            check_request(self._model_config(), self.config.adapter)
        self.config = before_data(self.config, base_config, self.device)
        self._vocabulary = open_vocabulary(self._model_config())
        tokenizer = self._vocabulary.tokenizer
        prepared = prepare(self.config, tokenizer, say=self.notes.append)
        self.notes += repeats(prepared.facts)
        batches = Batches(prepared.train, self.config.train, pad_id=tokenizer.pad_token_id)
        self.config, total = after_data(self.config, batches.steps_per_epoch, has_held_out=prepared.eval is not None)
        self._compare_with_checkpoint(prepared.facts["fingerprint"], total)
        write_run(self.config, self.run / "run.yaml")
        return prepared, batches, total

    def _compare_with_checkpoint(self, data: str, total: int) -> None:
        if not self.start:
            return
        known = self.extra
        if known["data"] != data and not compare.is_allowed("data.train", self.allow):
            raise RequestError(
                "the training data has changed since this run began, so the same step would see other samples.",
                code="data-changed",
                where="data.train",
                remedy="Put the data back, start a new run with another `output`, or insist with --allow data.train.",
            )
        if known["total_steps"] != total:
            self.notes.append(
                schedule.continuation_note(
                    known["state"]["step"],
                    known["total_steps"],
                    total,
                    self.config.optim,
                    read_resolved(self.run / "run.yaml").optim,
                )
            )
        now = versions()
        then = manifests.read(self.start.path).facts["versions"]
        changed = [f"{name} {then[name]} → {now[name]}" for name in now if name in then and then[name] != now[name]]
        if changed:
            self.notes.append(
                f"library versions changed, so bits may differ from an uninterrupted run: {', '.join(changed)}"
            )

    def _model_config(self) -> ModelConfig:
        """Where the model is opened from: the run file's path, or what this run wrote itself."""
        config = self.config.model
        if self.config.adapter is None and self.start:
            return config.model_copy(update={"path": str(self.start.path / "model"), "revision": None})
        own = base_folder.existing(self.run)
        return config if own is None else config.model_copy(update={"path": str(own), "revision": None})

    def model(self) -> tuple[Base, nn.Module]:
        self._make_base()
        self._write_unquantised()
        base = open_base(self._model_config(), device=self.device, vocabulary=self._vocabulary, own_layers=True)
        self.notes += base.choice.notes if base.choice else ()
        self._choice = base.choice
        own = base_folder.existing(self.run)
        if own is None and self.origin is not None:
            fit_vocabulary(base, self.origin.folder)
        if own is not None and self.config.adapter is not None:
            base.new_token_ids = tuple(manifests.read(own).facts["new_token_ids"])
        elif base.differs and self.config.adapter is not None:
            own = base_folder.write_base(self.run, base)
            self.notes.append(f"wrote the base once to {own}, so that plain peft opens final/")
        model: Any = base.model
        if self.config.adapter is not None:
            model = self._adapted(base, str(own) if own else base.source.name)
            self.notes += adapters.matched(model).notes
        else:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        self.config.model.attention = getattr(base.model.config, "_attn_implementation", None)
        write_run(self.config, self.run / "run.yaml")  # a resumed run attends by the same kernels
        if self.config.train.memory == "recompute":
            recompute(base.model)
        if self.config.train.compile:
            from luthier.models.compile import by_layer

            by_layer(base.model)
        return base, model

    def _make_base(self) -> None:
        """Write what this stage's base is made from: the origin folded into its base, or the origin's run's own base."""
        origin = self.origin
        if origin is None or base_folder.existing(self.run) is not None:
            return
        if origin.then == "merge":
            model = unquantised(self._model_config(), self.device)
            vocabulary = self._vocabulary or open_vocabulary(model)
            source = locate_base(model)
            if not base_folder.is_fetched(source):
                open_base(model, device=self.device, vocabulary=vocabulary)  # which fetches it
            parents = [{"kind": "base", **self._identity(source)}, origin.parent]
            self._check_base(parents[0])
            own = base_folder.write_merged(self.run, model, vocabulary, origin.folder, parents, device=self.device)
            self.notes.append(f"merged {origin.folder} into its base, in fp32 and rounded once: {own}")
        elif origin.own_base is not None:
            base_folder.adopt(self.run, origin.own_base)

    def _write_unquantised(self) -> None:
        """A quantised base that plain libraries would not find again is written in 16 bits, and opened from there."""
        model = self._model_config()
        if form_of(model) is None or base_folder.existing(self.run) is not None:
            return
        source = locate_base(model)
        plain = source.kind == "hub" or (source.kind == "folder" and source.path is not None and is_plain(source.path))
        if plain and not model.new_tokens and self.origin is None:
            return
        base = open_base(unquantised(model, self.device), device="cpu", vocabulary=self._vocabulary)
        if self.origin is not None:
            fit_vocabulary(base, self.origin.folder)
        if base.differs:
            own = base_folder.write_base(self.run, base)
            self.notes.append(f"wrote the base once to {own}, in 16 bits, so that plain peft opens final/")

    def _adapted(self, base: Base, name: str) -> Any:
        """The base with the adapter that trains: a new one, the origin's, or the checkpoint's."""
        adapter = self.config.adapter
        assert adapter is not None
        seed = seed_of(self.config.train.seed, "adapter")
        folder, pair = (self.start.path / "adapter", self.then.get("stack")) if self.start else (None, None)
        if self.origin is not None:
            folder, pair = self.origin.folder, self.origin.stack
            if self.origin.then == "stack":
                return stack.put_on(base, folder, adapter, base_name=name, seed=seed)
        if folder is None or adapter.then in (None, "merge"):
            return adapters.attach(base, adapter, new_token_ids=base.new_token_ids, base_name=name, seed=seed)
        if pair is not None:
            return stack.open_split(base, folder, pair, base_name=name)
        model, _ = open_adapter(base, folder, trainable=True)
        model.peft_config["default"].base_model_name_or_path = name
        model.peft_config["default"].revision = base.source.revision if name == base.source.name else None
        return model

    def _check_base(self, identity: dict[str, Any]) -> None:
        origin = self.origin
        if origin is None or not origin.base or compare.is_allowed("model.path", self.allow):
            return
        if identity["fingerprint"] != origin.base:
            raise other_base(identity["name"], origin.folder)

    def _lineage(self, model: nn.Module, identity: dict[str, Any]) -> dict[str, Any]:
        """What manifests say of where this run's results come from."""
        earlier = [self.origin.parent] if self.origin else [p for p in self.then.get("parents", []) if p["kind"] != "base"]  # fmt: skip
        facts: dict[str, Any] = {"base": identity, "parents": [{"kind": "base", **identity}, *earlier]}
        if stack.is_stacked(model):
            known = self.origin.stack if self.origin and self.origin.stack and self.origin.then == "continue" else self.then.get("stack")  # fmt: skip
            below = known.get("below", {}) if known else self.origin.parent if self.origin else {}
            facts["stack"] = {"below": below, **stack.facts_of(cast(Any, model))}
        return facts

    def parts(
        self, base: Base, model: nn.Module, prepared: Prepared, batches: Batches, total: int, events: Events
    ) -> Parts:
        config = self.config
        optimizer = optimizers.build(model, config.optim, adapter=config.adapter is not None)
        environment = numerics.environment(self.device, base.model)
        identity = self._identity(base.source)
        if self.origin is not None and self.origin.then != "merge":
            self._check_base(identity)
        checkpoints = Checkpoints(
            self.run, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every, tokenizer=base.tokenizer,
            facts=self._lineage(model, identity),
            metadata={"luthier.base": identity["fingerprint"]} if config.adapter else {}, say=self.say,
        )  # fmt: skip
        size = rehearse_saving(config, self.run, model, optimizer, checkpoints)
        rehearse_vocabulary(base.model, prepared.train, len(base.tokenizer))
        if config.train.packing:
            rehearse_packing(model, prepared.train, config.train, self.device)
        log = MetricsLog(self.run / "metrics.jsonl")
        if self.start:
            self._restore(model, optimizer, checkpoints, environment, identity)
        elif self.origin is not None and self.origin.moments is not None:
            checkpoints.load(self.origin.moments, model, optimizer)
        log.cut(self.extra.get("metrics_length", 0))
        checkpoints.reserve(model, optimizer)
        for line in optimizer.describe():
            self.say(line)
        self.say(
            f"{total} steps, {batches.steps_per_epoch} an epoch, on {environment['device']} in {config.model.precision or 'the precision of its folder'}"
        )
        self.say(
            f"checkpoints: {self.run / 'checkpoints'} ({readable_size(size)} each, every {config.checkpoint.every} steps)"
        )
        self.say(f"final: {self.run / 'final'}")
        self._write_facts(model, prepared, environment, total, checkpoints.facts["parents"])
        return Parts(
            config, self.run, model, optimizer, batches, checkpoints,
            Measurer(config, base.tokenizer, prepared.eval, self.device), log, events, self.device, total,
            {"data": prepared.facts["fingerprint"], "total_steps": total, "environment": environment},
        )  # fmt: skip

    def _identity(self, source: BaseSource) -> dict[str, Any]:
        """The base as manifests name it."""
        own = base_folder.existing(self.run)
        folder = own or source.path
        identity: dict[str, Any] = {"name": str(own) if own else source.name, "revision": source.revision}
        if self.config.adapter is None and self.start:
            return manifests.read(self.start.path).facts["base"]
        if self._choice is not None:  # the fingerprint is of the 16-bit source; this says what was made of it
            identity["quantisation"] = quantisation_of(self.config.model, self._choice)
            identity["dtype"] = str(dtype_of(self.config.model, self.device)).removeprefix("torch.")
        is_folder = folder is not None and folder.is_dir()
        found = fingerprint.of_folder(folder) if is_folder else fingerprint.of_file(folder) if folder else ""
        return {**identity, "fingerprint": found}

    def _restore(
        self,
        model: nn.Module,
        optimizer: Any,
        checkpoints: Checkpoints,
        environment: dict[str, Any],
        identity: dict[str, Any],
    ) -> None:
        assert self.start
        then = manifests.read(self.start.path).facts["base"]
        if then["fingerprint"] != identity["fingerprint"] and not compare.is_allowed("model.path", self.allow):
            raise RequestError(
                f"the base at {identity['name']} is not the one this run was trained on (its weights differ).",
                code="base-changed",
                where="model.path",
                remedy="Give the right base with model.path=…, or insist with --allow model.path.",
            )
        if then.get("quantisation") != identity.get("quantisation") and not compare.is_allowed("model", self.allow):
            raise RequestError(
                "the base is not quantised as it was when this run was trained: other layers stay in 16 bits, or its precision is another.",
                code="base-changed",
                where="model.precision",
                remedy="Put model.precision and model.keep_16bit back, or insist with --allow model.",
            )
        checkpoints.load(self.start, model, optimizer)
        self.say(f"resuming from step {self.start.step}: {self.start.path}")
        changed = numerics.differences(self.extra["environment"], environment)
        if changed:
            self.say(f"bits may differ from an uninterrupted run: {', '.join(changed)}")

    def _write_facts(
        self, model: nn.Module, prepared: Prepared, environment: dict[str, Any], total: int, parents: Any
    ) -> None:
        facts = {
            "parents": parents,
            "summary": adapters.summary(model, self.config.adapter),
            "data": prepared.facts,
            "device": environment["device"],
            "environment": environment,
            "versions": versions(),
            "total_steps": total,
        }
        replace_file(self.run / "facts.json", json.dumps(facts, indent=1, default=str).encode())
