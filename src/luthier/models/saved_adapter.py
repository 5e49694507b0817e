"""Opening a saved adapter on its base, with nothing missing and nothing left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from luthier.artifacts.tensorfile import read_header
from luthier.errors import ArtifactError
from luthier.models.open import Base
from luthier.models.quiet import no_deprecations

WEIGHTS = "adapter_model.safetensors"


def open_adapter(base: Base, folder: Path, *, trainable: bool) -> tuple[PeftModel, Any]:
    """Put the adapter in a folder on an opened base.

    Args:
        trainable: exactly what was trained trains again; else nothing does.

    Returns:
        The peft model, in training mode if trainable, and the tokenizer: the adapter's own, else the base's.

    Raises:
        ArtifactError: the adapter's tensors are not the ones its config asks for on this base, or nothing would train.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ArtifactError(
            f"the adapter's weights, {WEIGHTS}, are not there.",
            code="file-missing",
            where=str(folder),
            remedy="Get the file; adapters in other formats can't be opened by this version.",
        )
    grown = len(_tokenizer(base, folder)) - base.model.get_input_embeddings().weight.shape[0]
    if grown > 0:
        base.model.resize_token_embeddings(len(_tokenizer(base, folder)), mean_resizing=False)
    try:
        with no_deprecations():
            model = PeftModel.from_pretrained(base.model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"peft cannot put this adapter on {base.source.name}: {' '.join(str(error).split())[:300]}",
            code="adapter-does-not-fit",
            where=str(folder),
            remedy="Give the base it was trained on: luthier.load(path, base=…).",
        ) from error
    _check_coverage(model, path)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable and count == 0:
        raise ArtifactError("no parameter of this adapter would train.", code="nothing-trains", where=str(folder))
    return model.train(trainable), _tokenizer(base, folder)


def _tokenizer(base: Base, folder: Path) -> Any:
    from transformers import AutoTokenizer

    has_own = (folder / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_own else base.tokenizer


def _check_coverage(model: PeftModel, path: Path) -> None:
    """peft only warns when names don't match; here they must."""
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    found = set(read_header(path)[0])
    missing, strange = sorted(expected - found), sorted(found - expected)
    if missing or strange:
        said = [f"{len(names)} {what} (such as {names[0]})" for names, what in ((missing, "missing"), (strange, "not expected")) if names]  # fmt: skip
        raise ArtifactError(
            f"the adapter's tensors are not the ones its config asks for on this base: {'; '.join(said)}.",
            code="coverage",
            where=str(path),
            remedy="Give the base it was trained on, or save the adapter again from the run.",
        )
