"""DoRA against its equation, formed whole, and against PEFT in test_dora_against_peft."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora.methods import DoRAConv1D, DoRALinear, dora_layer
from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRALinear, inject, load_adapter, lora_layer, remove, save_adapter
from minilora.torch_lora.adapter_layer import dense_weight
from minilora.torch_lora.updates import updates_of


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is (in, out)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])  # as transformers does


BASES = {
    "linear": lambda: nn.Linear(12, 8),
    "no bias": lambda: nn.Linear(12, 8, bias=False),
    "Conv1D": lambda: Conv1D(8, 12),
    "square Conv1D": lambda: Conv1D(12, 12),
    "4 bits": lambda: NF4Linear(nn.Linear(12, 8)),
}


def trained(base: nn.Module, **settings) -> DoRALinear:
    """A layer in which A, B and m are noise."""
    layer = dora_layer(base, **({"r": 3, "alpha": 6} | settings))
    with torch.no_grad():
        layer.B.normal_()
        layer.m.mul_(torch.rand_like(layer.m) + 0.5)
    return layer


def as_the_paper_has_it(layer, x, A, B, m, norm_has_gradient=False):
    """[DoRA] eq. 5, with the weight formed whole."""
    W = dense_weight(layer.base, torch.float32)
    W = W.T if layer.stores_in_by_out else W
    V = W + layer.scaling * B @ A
    length = V.norm(dim=1, keepdim=True)
    return F.linear(x, m[:, None] * V / (length if norm_has_gradient else length.detach()), layer.base.bias)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]()


def test_a_new_layer_changes_no_bit(base):
    x = torch.randn(2, 5, 12)
    assert torch.equal(dora_layer(base, r=3, alpha=6)(x), base(x))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_are_the_papers(base, use_rslora):
    layer, x = trained(base, use_rslora=use_rslora), torch.randn(2, 5, 12, requires_grad=True)
    ours = layer(x)
    dy = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, [x, layer.A, layer.B, layer.m], dy)
    theirs = as_the_paper_has_it(layer, x, layer.A, layer.B, layer.m)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours_, theirs_ in zip(grads, torch.autograd.grad(theirs, [x, layer.A, layer.B, layer.m], dy), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("make", [make for kind, make in BASES.items() if kind != "4 bits"])  # that is float32
def test_gradients_are_those_of_finite_differences_where_the_length_stands_still(make):
    layer = trained(make()).double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    lengths = layer.lengths(torch.float64)
    layer.lengths = lambda dtype: lengths
    names = ["A", "B", "m"]

    def run(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, layer.A, layer.B, layer.m))


def test_the_lengths_are_those_of_the_whole_weight(base):
    layer = trained(base)
    W = dense_weight(base, torch.float32)
    V = (W.T if layer.stores_in_by_out else W) + layer.scaling * layer.B @ layer.A
    torch.testing.assert_close(layer.lengths(torch.float32), V.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_merging_gives_the_live_output_and_unmerging_the_same_bits(base):
    layer, x = trained(base), torch.randn(5, 12)
    live = layer(x)
    if isinstance(base, NF4Linear):
        with pytest.raises(TypeError, match="does not store floats"):
            layer.merge()
        torch.testing.assert_close(layer.fused()(x), live, rtol=1e-5, atol=1e-5)
        return
    before = base.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), live, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(base.weight, before)
    torch.testing.assert_close(layer.fused()(x), live, rtol=1e-5, atol=1e-5)


def test_the_update_is_what_merging_adds(base):
    layer = trained(base)
    W = dense_weight(base, torch.float32)
    torch.testing.assert_close(W + layer.delta_weight(), layer.merged_weight(torch.float32), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.adapt(W), layer.merged_weight(torch.float32), rtol=0, atol=0)


def test_dropout_leaves_the_bases_own_output_whole(base):
    x = torch.randn(5, 12)
    layer = trained(base, dropout=0.5).train()
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    W = dense_weight(layer.base, torch.float32)
    W = W.T if layer.stores_in_by_out else W
    g = layer.m / (W + layer.scaling * layer.B @ layer.A).norm(dim=1)
    wanted = layer.base(x) + (g - 1) * (dropped @ W.T) + g * layer.scaling * (dropped @ layer.A.T @ layer.B.T)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_one_without_a_nan():
    base = nn.Linear(12, 8)
    with torch.no_grad():
        base.weight[3] = 0
    layer = DoRALinear(base, r=3, alpha=6)
    y = layer(torch.randn(5, 12))
    y.square().sum().backward()
    assert torch.equal(y[:, 3], base.bias[3].expand(5))
    assert all(p.grad.isfinite().all() for p in (layer.A, layer.B, layer.m))
    assert layer.merged_weight(torch.float32).isfinite().all()


def test_what_it_keeps_for_the_backward_is_its_result_and_not_what_it_scaled():
    layer, kept = DoRALinear(nn.Linear(12, 8, bias=False), r=3, alpha=6), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(torch.randn(50, 12, requires_grad=True))
    tall = {tensor.data_ptr() for tensor in kept if tensor.shape == (50, 8)}
    assert tall == {y.data_ptr()}


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 8), lambda: Conv1D(8, 12)], ids=["linear", "Conv1D"])
def test_files_come_back_and_are_told_from_loras(make, tmp_path):
    model = nn.Sequential(nn.Identity(), make())
    plain = nn.Sequential(nn.Identity(), make())
    plain[1].load_state_dict(model[1].state_dict())
    inject(model, ["1"], lambda base: trained(base))
    save_adapter(model, tmp_path)
    x = torch.randn(5, 12)
    wanted = model(x)
    with pytest.raises(ValueError, match=r"use_dora is True, but 1 is a LoRA\w+: wrap=minilora.methods.dora_layer"):
        load_adapter(plain, tmp_path)
    assert type(plain[1]) is type(make())
    load_adapter(plain, tmp_path, dora_layer)
    assert torch.equal(plain(x), wanted)
    with pytest.raises(ValueError, match="not plain LoRA"):
        updates_of(plain)
    remove(plain)
    inject(plain, ["1"], lambda base: lora_layer(base, r=3, alpha=6))
    with pytest.raises(ValueError, match="use_dora is True"):
        load_adapter(plain, tmp_path, dora_layer)
    save_adapter(plain, tmp_path)
    with pytest.raises(ValueError, match="use_dora is False"):
        load_adapter(model, tmp_path)


def test_it_says_what_it_wraps():
    with pytest.raises(TypeError, match="DoRALinear wraps a linear layer"):
        dora_layer(nn.Embedding(4, 8), r=2, alpha=4)
    with pytest.raises(ValueError, match="wrapped already"):
        dora_layer(LoRALinear(nn.Linear(4, 4), r=2, alpha=4), r=2, alpha=4)
    assert isinstance(dora_layer(Conv1D(8, 12), r=2, alpha=4), DoRAConv1D)


def test_it_trains_one_number_an_output_more_than_lora():
    counts = {
        kind: sum(p.numel() for p in kind(nn.Linear(12, 8), r=3, alpha=6).parameters() if p.requires_grad)
        for kind in (LoRALinear, DoRALinear)
    }
    assert counts[DoRALinear] == counts[LoRALinear] + 8


def test_a_large_bias_takes_no_digits_of_the_lengths():
    torch.manual_seed(0)
    base = nn.Linear(64, 32).to(torch.bfloat16)
    with torch.no_grad():
        base.bias.fill_(100.0)
    layer = DoRALinear(base, r=4, alpha=8)
    with torch.no_grad():
        layer.B.normal_()
    V = base.weight.double() + layer.scaling * layer.B.double() @ layer.A.double()
    error = (layer.lengths(torch.bfloat16).double() / V.norm(dim=1) - 1).abs().max()
    assert error < 2**-8  # of bfloat16's 8 bits, in which A Wᵀ is computed; with the bias in the sum it is 0.012


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_length_of_a_part_in_300_more_is_not_rounded_away_in_bfloat16(dropout):
    base = nn.Linear(64, 512, bias=False).to(torch.bfloat16)
    layer, x = dora_layer(base, r=3, alpha=6, dropout=dropout), torch.randn(256, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.m.mul_(1.003)
        before, after = base(x).double(), layer(x).double()
    slope = float((before * after).sum() / before.square().sum())
    assert slope == pytest.approx(1.003, abs=3e-4)  # 131,072 outputs, each rounded by a part in 512 at random
