"""Several adapters become one change by the formulas that peft has, and the same however the stream cuts tensors."""

from pathlib import Path

import pytest
import tiny
import torch
from adapters import make_adapter, opened, tensors
from peft import PeftModel
from peft.utils import merge_utils

import luthier
from luthier.export.merged import combine, lowrank
from luthier.export.merged.combine import limit_of, uniform

WEIGHTS = [0.75, 0.5]
SETTINGS = {"target_modules": ["q_proj", "up_proj"], "r": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory) -> list[Path]:
    """Two adapters; the second is of another rank and also changes layers that the first does not."""
    home = tmp_path_factory.mktemp("adapters")
    other = {"target_modules": ["q_proj", "up_proj", "v_proj"], "r": 2}
    return [make_adapter(base, home / "a", **SETTINGS), make_adapter(base, home / "b", seed=9, **other)]


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(opened(base), str(adapter)).base_model.model
    return {
        f"{name}.weight": module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_pruning_methods_are_those_of_peft(method, base, pair, tmp_path):
    luthier.export(pair, tmp_path / "out", to="merged", weights=WEIGHTS, combine=method, density=0.3, prove=False)
    before, found = tensors(base), tensors(tmp_path / "out")
    first, second = (deltas(base, each) for each in pair)
    for name in second:
        tasks = [first.get(name, torch.zeros_like(second[name])), second[name]]
        wanted = before[name] + getattr(merge_utils, method)(tasks, torch.tensor(WEIGHTS), 0.3)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5)
        assert not torch.equal(found[name], before[name])
    untouched = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found[untouched], before[untouched])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_share_and_is_the_same_however_tensors_are_cut(method, base, pair, tmp_path, monkeypatch):
    options = {"to": "merged", "weights": WEIGHTS, "combine": method, "density": 0.6, "prove": False}
    luthier.export(pair, tmp_path / "one", **options)
    monkeypatch.setattr(lowrank, "BLOCK", 96)
    monkeypatch.setattr("luthier.export.stream.BLOCK", 96)
    luthier.export(pair, tmp_path / "again", **options)
    luthier.export(pair, tmp_path / "seed", seed=1, **options)
    before, one, again, seed = (tensors(folder) for folder in (base, *(tmp_path / n for n in ("one", "again", "seed"))))
    name = "model.layers.0.self_attn.v_proj.weight"  # of the second adapter alone
    task = deltas(base, pair[1])[name]
    change = one[name] - before[name]
    kept = change.abs() > 1e-7
    assert 0.5 < kept.float().mean() < 0.7
    torch.testing.assert_close(change[kept], (task * 0.5 / 0.6)[kept], rtol=0, atol=1e-6)
    assert all(torch.allclose(one[each], again[each], rtol=0, atol=1e-6) for each in one)
    assert not torch.allclose(one[name], seed[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.99])
def test_limit_is_the_smallest_value_kept(density, monkeypatch):
    torch.manual_seed(0)
    product = lowrank.LowRank(torch.randn(60, 3), torch.randn(1, 3, 70))
    monkeypatch.setattr(combine, "BLOCK", 700)
    whole = (product.left @ product.right[0]).abs().reshape(-1)
    kept = int(density * whole.numel())
    limit = limit_of(product, 70, density)
    assert int((whole >= limit * (1 - 1e-5)).sum()) >= kept >= int((whole > limit * (1 + 1e-5)).sum())


def test_random_numbers_are_even_and_depend_on_position_alone():
    values = uniform(0, 100_000, 3, "x")
    assert torch.equal(values[777:1777], uniform(777, 1000, 3, "x"))
    assert abs(float(values.mean()) - 0.5) < 0.01 and abs(float((values < 0.1).float().mean()) - 0.1) < 0.01
    assert abs(float(torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1])) < 0.02
    assert not torch.equal(values[:9], uniform(0, 9, 4, "x")) and not torch.equal(values[:9], uniform(0, 9, 3, "y"))


@pytest.mark.parametrize(
    "options", [{"combine": "slerp"}, {"combine": "ties"}, {"combine": "ties", "density": 1.5}, {"density": 0.5}]
)
def test_senseless_combination_is_refused(options, pair, tmp_path):
    with pytest.raises(luthier.RequestError) as raised:
        luthier.export(pair, tmp_path / "out", to="merged", prove=False, **options)
    assert raised.value.code == "combine"


def test_one_adapter_has_nothing_to_be_combined_with(pair, tmp_path):
    with pytest.raises(luthier.RequestError, match="nothing to combine"):
        luthier.export(pair[0], tmp_path / "out", to="merged", combine="ties", density=0.5)
