"""The rehearsal before the first step: a packed sample that sees its neighbour is found, however many rows there are."""

import numpy as np
import pytest
import torch
from tiny import make_llama
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from luthier.config.schema import TrainConfig
from luthier.errors import RequestError
from luthier.training.rehearsal import rehearse_packing

SAMPLES = [(np.arange(start, start + 12, dtype=np.int32), np.ones(12, np.bool_)) for start in (10, 40)]
CPU = torch.device("cpu")


class SeesNeighboursInSeveralRows(nn.Module):
    """Does what flash attention does in transformers, which needs a GPU: borders are found in a single row only."""

    def forward(self, input_ids, position_ids, use_cache):
        ids = torch.nn.functional.one_hot(input_ids, 64).float()
        begins = (position_ids == 0).cumsum(-1)
        apart = begins[:, :, None] == begins[:, None, :] if len(input_ids) == 1 else torch.ones(1, 1, 1)
        return CausalLMOutput(logits=(apart * torch.ones(ids.shape[1], ids.shape[1]).tril()) @ ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_model_that_keeps_packed_samples_apart_passes(tmp_path, attention, micro_batch):
    model = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "m"), attn_implementation=attention).train()
    rehearse_packing(model, SAMPLES, TrainConfig(micro_batch=micro_batch), CPU)
    assert model.training


def test_leak_that_only_several_rows_show_is_found_where_the_run_computes_several():
    model = SeesNeighboursInSeveralRows()
    rehearse_packing(model, SAMPLES, TrainConfig(micro_batch=1), CPU)
    with pytest.raises(RequestError, match=r"packed into one row see each other.*train\.packing: false"):
        rehearse_packing(model, SAMPLES, TrainConfig(micro_batch=2), CPU)
