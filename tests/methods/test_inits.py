"""PiSSA and OLoRA against their equations with the residual formed whole, LoftQ against its algorithm's promises.

Tolerances, where nothing else is said, are those of float32 for sums of a dozen products of size 10 or so.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dora import BASES, Conv1D
from torch import nn

from minilora.methods import LoftQLinear, OLoRAConv1D, PiSSAConv1D, olora_layer, pissa_layer
from minilora.numpy_lora.rank import truncated_svd
from minilora.qlora import NF4Linear, QLoRALinear, quantize
from minilora.qlora.linear import kept_as
from minilora.torch_lora import LoRALinear, count_parameters, inject, load_adapter, lora_layer, remove, save_adapter
from minilora.torch_lora.adapter_layer import dense_weight
from minilora.torch_lora.updates import set_updates, updates_of

WRAPS = {"PiSSA": pissa_layer, "OLoRA": olora_layer}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]()


@pytest.fixture(params=WRAPS)
def wrap(request):
    return WRAPS[request.param]


def trained(layer):
    """The same layer, with A and B away from their start."""
    with torch.no_grad():
        layer.A.add_(torch.randn_like(layer.A))
        layer.B.add_(torch.randn_like(layer.B))
    return layer


def weight_of(layer):
    W = dense_weight(layer.base, torch.float32)
    return W.T if layer.stores_in_by_out else W


def as_the_papers_have_it(layer, x, A, B):
    """The base's weight replaced by what A0 and B0 leave of it, and LoRA beside that."""
    residual = weight_of(layer).to(x.dtype) - layer.scaling * layer.B0 @ layer.A0
    return F.linear(x, residual, layer.base.bias) + layer.scaling * (x @ A.T) @ B.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_new_layer_changes_no_bit_in_training_neither(base, wrap, dtype, dropout):
    if dtype == torch.bfloat16:
        base.to(dtype)
    x = torch.randn(2, 5, 12, dtype=dtype)
    layer = wrap(base, r=3, alpha=6, dropout=dropout).train()
    zero = lora_layer(base, r=6, alpha=6, dropout=dropout)  # in bfloat16 a Conv1D's fused sum differs from its own
    assert torch.equal(layer(x), base(x) if dtype == torch.float32 else zero(x))
    assert layer.A.abs().max() > 0.1 and layer.B.abs().max() > 0.1


@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_are_the_papers(base, wrap, use_rslora):
    layer = trained(wrap(base, r=3, alpha=6, use_rslora=use_rslora))
    x = torch.randn(2, 5, 12, requires_grad=True)
    ours, theirs = layer(x), as_the_papers_have_it(layer, x, layer.A, layer.B)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    wanted = torch.autograd.grad(theirs, [x, layer.A, layer.B], dy)
    for mine, its in zip(torch.autograd.grad(ours, [x, layer.A, layer.B], dy), wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", [make for kind, make in BASES.items() if kind != "4 bits"])  # that is float32
def test_gradients_are_those_of_finite_differences(make, wrap):
    layer = trained(wrap(make(), r=3, alpha=6)).double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def run(x, A, B):
        return torch.func.functional_call(layer, {"A": A, "B": B}, x)

    assert torch.autograd.gradcheck(run, (x, layer.A, layer.B))


@pytest.mark.parametrize("alpha, use_rslora", [(6, False), (0.75, True)])
def test_pissa_begins_at_the_best_copy_of_rank_r_evenly_parted(base, alpha, use_rslora):
    layer = pissa_layer(base, r=3, alpha=alpha, use_rslora=use_rslora)
    W = weight_of(layer)
    B, A = (torch.from_numpy(matrix) for matrix in truncated_svd(W.numpy(), 3))
    torch.testing.assert_close(layer.scaling * layer.B @ layer.A, B @ A, rtol=1e-5, atol=1e-5)
    shares = torch.linalg.svdvals(W)[:3].diag() / layer.scaling
    torch.testing.assert_close(layer.A @ layer.A.T, shares, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.B.T @ layer.B, shares, rtol=1e-5, atol=1e-5)


def test_olora_begins_at_the_first_columns_of_q_and_rows_of_r(base):
    layer = olora_layer(base, r=3, alpha=6)
    Q, R = np.linalg.qr(weight_of(layer).numpy())
    torch.testing.assert_close(layer.B @ layer.A, torch.from_numpy(Q[:, :3] @ R[:3]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.B.T @ layer.B, torch.eye(3), rtol=1e-5, atol=1e-5)


def test_what_is_learnt_counts_in_bfloat16_where_it_is_less_than_b_can_be_told_apart_by(wrap):
    layer = wrap(nn.Linear(12, 8, bias=False), r=3, alpha=6)
    with torch.no_grad():
        layer.B.mul_(1 + 2**-11)  # bfloat16 has 8 bits: a change of 2⁻¹¹ rounds to none
        layer.base.bfloat16().weight.zero_()  # so that the output is the update's alone
    x = torch.randn(50, 12)
    exact = layer.scaling * 2**-11 * (x @ layer.A0.T) @ layer.B0.T
    # five roundings by 2⁻⁹ at most: of x, A0, B − B0, their product, and the result
    assert (layer(x.bfloat16()).float() - exact).norm() < 5 * 2**-9 * exact.norm()


def test_dropout_falls_on_both_halves_alike(base, wrap):
    x = torch.randn(5, 12)
    layer = trained(wrap(base, r=3, alpha=6, dropout=0.5)).train()
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    update = layer.scaling * (layer.B @ layer.A - layer.B0 @ layer.A0)
    torch.testing.assert_close(ours, base(x) + dropped @ update.T, rtol=1e-5, atol=1e-4)


def test_merging_gives_the_live_output_and_unmerging_the_same_bits(base, wrap):
    layer, x = trained(wrap(base, r=3, alpha=6)), torch.randn(5, 12)
    live = layer(x)
    if isinstance(base, NF4Linear):
        with pytest.raises(TypeError, match="does not store floats"):
            layer.merge()
    else:
        before = base.weight.detach().clone()
        layer.merge()
        torch.testing.assert_close(layer(x), live, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(layer.as_lora()(x), live, rtol=1e-5, atol=1e-4)
        layer.unmerge()
        assert torch.equal(base.weight, before)
    torch.testing.assert_close(layer.fused()(x), live, rtol=1e-5, atol=1e-4)
    W = dense_weight(base, torch.float32)
    assert torch.equal(layer.adapt(W), W + layer.delta_weight())


def test_only_a_and_b_train_and_remove_gives_the_base_back(base, wrap):
    model = nn.Sequential(nn.Identity(), base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    inject(model, ["1"], lambda base: wrap(base, r=3, alpha=6))
    layer = model[1]
    assert count_parameters(model).trainable == 3 * (layer.A.shape[1] + len(layer.B))
    model(torch.randn(5, 12)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"1.A", "1.B"}
    trained(layer)
    remove(model)
    assert model[1] is base
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_is_a_lora_of_twice_the_rank(base, wrap, use_rslora):
    layer, x = trained(wrap(base, r=3, alpha=6, dropout=0.1, use_rslora=use_rslora)).eval(), torch.randn(5, 12)
    before = torch.get_rng_state()
    plain = layer.as_lora()
    assert torch.equal(torch.get_rng_state(), before)
    assert (plain.r, plain.dropout, plain.use_rslora) == (6, 0.1, use_rslora)
    assert plain.scaling == pytest.approx(layer.scaling, rel=1e-15)
    assert plain.base is base
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-6, atol=1e-6)
    assert layer.A.requires_grad  # and not what they were made of


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 8), lambda: Conv1D(8, 12)], ids=["linear", "Conv1D"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_its_file_is_a_lora_over_the_base_as_it_is(make, wrap, use_rslora, tmp_path):
    model, plain = nn.Sequential(nn.Identity(), make()), nn.Sequential(nn.Identity(), make())
    plain.load_state_dict(model.state_dict())
    inject(model, ["1"], lambda base: trained(wrap(base, r=3, alpha=6, use_rslora=use_rslora)))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 6
    load_adapter(plain, tmp_path)
    x = torch.randn(5, 12)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-6, atol=1e-6)
    ours, theirs = updates_of(model)["1"], updates_of(plain)["1"]
    assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B) and ours.scaling == theirs.scaling


def test_as_a_file_or_a_sum_brings_its_own_a_and_b_it_takes_neither(wrap, tmp_path):
    model, other = nn.Sequential(nn.Identity(), nn.Linear(12, 8)), nn.Sequential(nn.Identity(), nn.Linear(12, 8))
    inject(model, ["1"], lambda base: trained(wrap(base, r=2, alpha=6)))
    save_adapter(model, tmp_path)
    refused = pytest.raises(ValueError, match=r"begins with A and B of its own.*wrap=lora_layer")
    with refused:
        load_adapter(other, tmp_path, wrap)
    with refused:
        set_updates(other, updates_of(model), wrap)
    assert type(other[1]) is nn.Linear and other[1].weight.requires_grad
    with refused:
        load_adapter(model, tmp_path)


def test_its_state_holds_what_it_began_with(wrap):
    layer, other = (trained(wrap(nn.Linear(12, 8), r=3, alpha=6)) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(other(x), layer(x))


def test_it_says_what_it_wraps_and_leaves_it_as_it_was(wrap):
    base = nn.Linear(12, 8)
    with pytest.raises(ValueError, match=r"r is 9: a weight of shape \(8, 12\) has 8 directions"):
        wrap(base, r=9, alpha=4)
    with torch.no_grad():
        base.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        wrap(base, r=2, alpha=4)
    assert base.weight.requires_grad
    with pytest.raises(TypeError, match="wraps a linear layer"):
        wrap(nn.Embedding(4, 8), r=2, alpha=4)
    with pytest.raises(ValueError, match="wrapped already"):
        wrap(LoRALinear(nn.Linear(4, 4), r=2, alpha=4), r=2, alpha=4)
    assert isinstance(wrap(Conv1D(8, 12), r=2, alpha=4), PiSSAConv1D | OLoRAConv1D)


# LoftQ


def distance(linear: nn.Linear, layer: LoRALinear) -> float:
    """How far a layer's whole weight is from the one it was made from, of that one's norm."""
    W = linear.weight.detach()
    return ((W - layer.merged_weight(torch.float32)).norm() / W.norm()).item()


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_loftq_says_how_far_it_begins_from_the_weight(steps, use_rslora):
    linear = nn.Linear(96, 64)
    alone = distance(linear, QLoRALinear(linear, r=8, alpha=4))
    layer = LoftQLinear(linear, r=8, alpha=4, use_rslora=use_rslora, steps=steps)
    assert len(layer.base.errors) == steps + 1
    assert layer.base.errors[0] == pytest.approx(alone, rel=1e-5)
    assert layer.base.errors[-1] == pytest.approx(distance(linear, layer), rel=1e-5)
    assert layer.base.errors[1] < 0.85 * alone  # of 64 nearly equal singular values of noise the 8 largest
    assert f"error {alone:.4f} alone, {layer.base.errors[-1]:.4f} with" in repr(layer)


def test_loftqs_a_and_b_are_the_best_for_its_base_and_every_step_quantizes_what_the_last_left():
    linear = nn.Linear(96, 64)
    W = linear.weight.detach()
    one, two = (LoftQLinear(linear, r=8, alpha=4, steps=steps) for steps in (1, 2))
    for layer in (one, two):
        lost = W - layer.base.dense_weight(torch.float32)
        beyond = torch.linalg.svdvals(lost)[8:].norm() / W.norm()
        assert layer.base.errors[-1] == pytest.approx(beyond.item(), rel=1e-4)
    wanted = quantize(W - one.delta_weight().detach(), double=True)
    assert torch.equal(two.base.packed, wanted.packed)
    assert two.base.errors[2] < one.base.errors[1]


def test_after_one_step_loftqs_base_is_qloras_and_so_is_its_file(tmp_path):
    linear, x = nn.Linear(96, 64), torch.randn(5, 96)
    model, other = nn.Sequential(nn.Identity(), linear), nn.Sequential(nn.Identity(), linear)
    inject(model, ["1"], lambda base: LoftQLinear(base, r=8, alpha=4))
    assert model[1].base.stored_as == NF4Linear(linear).stored_as
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path, QLoRALinear)
    assert torch.equal(other(x), model(x))


def test_after_more_steps_the_file_is_of_another_base_and_says_so(tmp_path):
    linear, x = nn.Linear(96, 64), torch.randn(5, 96)
    wrap = partial(LoftQLinear, steps=3)
    model, qlora, again = (nn.Sequential(nn.Identity(), linear) for _ in range(3))
    inject(model, ["1"], lambda base: wrap(base, r=8, alpha=4))
    assert not torch.equal(model[1].base.packed, NF4Linear(linear).packed)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"LoftQ's after 3 steps with r=8, here over nf4, block_size=64, double:"):
        load_adapter(qlora, tmp_path, QLoRALinear)
    load_adapter(again, tmp_path, wrap)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="no base can be kept as"):
        kept_as(model[1].base.stored_as)


def test_remove_cannot_give_back_the_weight_that_loftq_took_and_gives_its_base():
    linear = nn.Linear(96, 64)
    before = linear.weight.detach().clone()
    model = nn.Sequential(nn.Identity(), linear)
    inject(model, ["1"], lambda base: LoftQLinear(base, r=8, alpha=4, steps=2))
    base = model[1].base
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"1.A", "1.B"}
    remove(model)
    assert model[1] is base and isinstance(base, NF4Linear)
    assert torch.equal(linear.weight, before)  # whoever kept it has it whole


def test_loftqs_layer_keeps_what_it_was_given():
    linear = nn.Linear(96, 64)
    layer = LoftQLinear(linear, r=8, alpha=4, dropout=0.25, use_rslora=True, block_size=32, double=False)
    assert (layer.r, layer.alpha, layer.dropout, layer.use_rslora) == (8, 4, 0.25, True)
    assert layer.base.stored_as == "nf4, block_size=32" and torch.equal(layer.base.bias, linear.bias)
    assert LoftQLinear(linear.bfloat16(), r=8, alpha=4).A.dtype == torch.float32


def test_loftq_refuses_what_has_no_floats_to_begin_from():
    linear = nn.Linear(12, 8)
    with pytest.raises(ValueError, match="steps is 0"):
        LoftQLinear(linear, r=2, alpha=4, steps=0)
    with pytest.raises(TypeError, match="NF4Linear has lost"):
        LoftQLinear(NF4Linear(linear), r=2, alpha=4)
    with pytest.raises(ValueError, match="r is 9"):
        LoftQLinear(linear, r=9, alpha=4)
    with pytest.raises(ValueError, match="wrapped already"):
        LoftQLinear(lora_layer(linear, r=2, alpha=4), r=2, alpha=4)
    zeros = nn.Linear(64, 8)
    nn.init.zeros_(zeros.weight)
    assert LoftQLinear(zeros, r=2, alpha=4).base.errors == (0, 0)
