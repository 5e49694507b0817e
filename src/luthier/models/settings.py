"""Settings of a model that are fixed when it is built: dropout and attention."""

from __future__ import annotations

from transformers import AttentionInterface, PreTrainedConfig

from luthier.errors import RequestError

_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_dropout",
    "resid_pdrop",
    "residual_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "dropout",
    "activation_dropout",
)


def set_dropout(config: PreTrainedConfig, rate: float) -> list[str]:
    """Sets every dropout rate that the config has, and returns their names; RequestError if it has none."""
    text = config.get_text_config()
    names = [name for name in _DROPOUTS if isinstance(getattr(text, name, None), int | float)]
    if not names:
        raise RequestError(
            f"a model of type {config.model_type} has no dropout rate in its config.",
            code="no-dropout",
            where="model.dropout",
            remedy="Leave model.dropout out; adapter.dropout acts on the adapter.",
        )
    for name in names:
        setattr(text, name, rate)
    return names


def check_attention(name: str) -> None:
    """Raises RequestError for an attention implementation that transformers does not name."""
    known = ["eager", *sorted(key for key in AttentionInterface().valid_keys() if not key.startswith("paged|"))]
    if name not in known:
        raise RequestError(
            f"there is no attention implementation {name!r}.",
            code="unknown-attention",
            where="model.attention",
            remedy=f"Choose one of {', '.join(known)}.",
        )
