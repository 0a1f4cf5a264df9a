"""GaLore against its algorithm written out plainly, and against torch's AdamW where the two are the same.

The authors' package, galore_torch, is not among our pinned ones. `authors` below does what it does, in its order of
operations; the two were compared once, with galore_torch 1.0, and agreed to 3e-7 after six steps.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from minilora.methods import GaLoreAdamW
from minilora.train.checkpoint import read_checkpoint, restore, save_checkpoint
from minilora.train.data import collate, mask_prompt
from minilora.train.trainer import train

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16)}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def gradients_of(shape, steps: int, dtype=torch.float32) -> list[Tensor]:
    """Gradients with clear leading directions, which turn from step to step."""
    u, v = torch.randn(shape[0], 6), torch.randn(6, shape[1])
    fall = torch.diag(torch.tensor([8.0, 5, 3, 2, 1, 0.5]))
    made = [(u + 0.3 * torch.randn_like(u)) @ fall @ v + 0.1 * torch.randn(shape) for _ in range(steps)]
    return [g.to(dtype) for g in made]


def stepped(optimizer: torch.optim.Optimizer, p: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach().clone()


def authors(W, gradients, *, lr, r, refresh, scale, betas=(0.9, 0.999), eps=1e-8):
    """[GaLore] algorithm 2 as the authors run it: no class, no options, one matrix."""
    W, M, V, P = W.clone(), 0, 0, None
    tall = W.shape[0] >= W.shape[1]
    for number, G in enumerate(gradients):
        if number % refresh == 0:
            U, _, Vt = torch.linalg.svd(G, full_matrices=False)
            P = Vt[:r] if tall else U[:, :r]
        R = G @ P.T if tall else P.T @ G
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R * R
        N = M / (V.sqrt() + eps)
        rate = lr * math.sqrt(1 - betas[1] ** (number + 1)) / (1 - betas[0] ** (number + 1))
        W -= rate * scale * (N @ P if tall else P @ N)
    return W


# What a step is


@pytest.mark.parametrize("refresh", [200, 2])
def test_steps_are_the_authors(shape, refresh):
    W, gradients = nn.Parameter(torch.randn(shape)), gradients_of(shape, 5)
    settings = {"lr": 0.02, "r": 4, "refresh": refresh, "scale": 0.25}
    wanted = {n: authors(W.detach(), gradients[:n], **settings) for n in (1, 2, 3, 5)}
    for n, its in wanted.items():
        ours = copy.deepcopy(W)
        got = stepped(GaLoreAdamW([ours], **settings), ours, gradients[:n])
        assert (its - W).abs().max() > 1e-3
        torch.testing.assert_close(got, its, rtol=0, atol=1e-6)


def test_the_first_step_has_the_sign_of_each_coordinate(shape):
    """Of zero moments: M̂ = R and V̂ = R², so N is R / |R|, whatever the betas."""
    W, (G,) = nn.Parameter(torch.randn(shape)), gradients_of(shape, 1)
    before = W.detach().clone()
    after = stepped(GaLoreAdamW([W], lr=0.1, r=3, scale=0.5), W, [G])
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    if shape[0] >= shape[1]:
        update = (G @ Vt[:3].T).sign() @ Vt[:3]
    else:
        update = U[:, :3] @ (U[:, :3].T @ G).sign()
    torch.testing.assert_close(after, before - 0.1 * 0.5 * update, rtol=0, atol=1e-6)


def test_it_is_adamw_where_the_projection_loses_nothing_and_the_root_hardly_counts(shape):
    """Where all gradients lie in r directions, G Pᵀ P = G. Where eps is far above √V, N is M̂ / eps, which is linear:
    so N P is AdamW's own M̂ / eps, up to √V / eps < 1e-4 of it."""
    r, tall = 3, shape[0] >= shape[1]
    span = torch.linalg.qr(torch.randn(min(shape), r)).Q
    gradients = [torch.randn(max(shape), r) @ span.T for _ in range(6)]
    gradients = gradients if tall else [g.T.contiguous() for g in gradients]
    W = nn.Parameter(torch.randn(shape))
    ours, theirs = copy.deepcopy(W), copy.deepcopy(W)
    settings = {"lr": 1e4, "eps": 1e5, "weight_decay": 1e-6}
    got = stepped(GaLoreAdamW([ours], r=r, scale=1.0, **settings), ours, gradients)
    wanted = stepped(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    assert (wanted - W).abs().max() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-5)


def test_a_step_moves_a_matrix_in_r_directions_of_its_smaller_side(shape):
    W, (G,) = nn.Parameter(torch.randn(shape)), gradients_of(shape, 1)
    before = W.detach().clone()
    change = stepped(GaLoreAdamW([W], lr=0.1, r=3), W, [G]) - before
    U, s, Vt = torch.linalg.svd(change)
    assert (s[:3] > 1e-3).all()
    assert (s[3:] < 1e-6).all()
    U_G, _, Vt_G = torch.linalg.svd(G)
    overlap = Vt[:3] @ Vt_G[:3].T if shape[0] >= shape[1] else U[:, :3].T @ U_G[:, :3]
    torch.testing.assert_close(torch.linalg.svdvals(overlap), torch.ones(3), rtol=0, atol=1e-5)  # the same subspace


def test_vectors_small_matrices_and_groups_without_r_have_torchs_adamw():
    made = [(7,), (20, 4), (3, 20), (5, 6, 7), (20, 12)]
    ours, theirs = ([nn.Parameter(torch.randn(s)) for s in made] for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = [
        GaLoreAdamW([{"params": ours[:4]}, {"params": ours[4:], "r": None}], r=4, **settings),
        torch.optim.AdamW(theirs, **settings),
    ]
    for mine, its in zip(ours, theirs, strict=True):
        mine.data.copy_(its)
    for _ in range(5):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


def test_weights_decay_as_adamws_do():
    W = nn.Parameter(torch.randn(20, 12))
    gradients, plain, decayed = gradients_of((20, 12), 1), copy.deepcopy(W), copy.deepcopy(W)
    without = stepped(GaLoreAdamW([plain], lr=0.1, r=3), plain, gradients)
    with_decay = stepped(GaLoreAdamW([decayed], lr=0.1, r=3, weight_decay=0.2), decayed, gradients)
    torch.testing.assert_close(without - with_decay, 0.1 * 0.2 * W.detach(), rtol=0, atol=1e-6)


def test_the_projector_is_made_anew_when_its_time_has_come_and_at_no_other():
    W = nn.Parameter(torch.randn(20, 12))
    optimizer, seen = GaLoreAdamW([W], r=3, refresh=3), []
    gradients = gradients_of((20, 12), 7)
    for gradient in gradients:
        stepped(optimizer, W, [gradient])
        seen.append(optimizer.state[W]["P"].clone())
    for number, P in enumerate(seen):
        wanted = torch.linalg.svd(gradients[number // 3 * 3], full_matrices=False).Vh[:3]
        assert torch.equal(P, wanted), number


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_are_as_small_as_the_report_says(dtype):
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in [(20, 12), (12, 20), (9,), (3, 20)]]
    optimizer = GaLoreAdamW(params, r=4)
    before = optimizer.report()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = [optimizer.state[p] for p in params]
    assert [{k: tuple(t.shape) for k, t in s.items() if isinstance(t, Tensor)} for s in states] == [
        {"P": (4, 12), "M": (20, 4), "V": (20, 4)},
        {"P": (12, 4), "M": (4, 20), "V": (4, 20)},
        {"M": (9,), "V": (9,)},
        {"M": (3, 20), "V": (3, 20)},
    ]
    tensors = [(k, t) for s in states for k, t in s.items() if isinstance(t, Tensor)]
    assert {t.dtype for _, t in tensors} == {torch.float32}
    report = optimizer.report()
    assert report == before  # it tells before there are any
    assert report.projector_bytes == sum(t.untyped_storage().nbytes() for k, t in tensors if k == "P")
    assert report.moment_bytes == sum(t.untyped_storage().nbytes() for k, t in tensors if k != "P")
    assert report.total_bytes == report.projector_bytes + report.moment_bytes
    assert report.adamw_bytes == 8 * (240 + 240 + 9 + 60)
    assert (report.n_tensors, report.n_projected) == (4, 2)


def test_a_layer_of_llama_2_7b_needs_a_sixteenth():
    p = nn.Parameter(torch.empty(11008, 4096, device="meta"))
    report = GaLoreAdamW([p], r=128).report()
    assert report.projector_bytes == 4 * 128 * 4096
    assert report.moment_bytes == 2 * 4 * 128 * 11008
    assert report.adamw_bytes == 2 * 4 * 11008 * 4096
    assert str(report).endswith("27.0 times as many")


def test_bfloat16_weights_are_rounded_once_a_step():
    gradients = gradients_of((20, 12), 6, torch.bfloat16)
    half = nn.Parameter(torch.randn(20, 12).bfloat16())
    whole = nn.Parameter(half.detach().float())
    settings = {"lr": 0.05, "r": 4, "refresh": 2, "weight_decay": 0.1}
    of_half, of_whole = GaLoreAdamW([half], **settings), GaLoreAdamW([whole], **settings)
    before = half.detach().clone()
    for gradient in gradients:
        stepped(of_half, half, [gradient])
        stepped(of_whole, whole, [gradient.float()])
        whole.data.copy_(whole.bfloat16())
        assert torch.equal(half.float(), whole)
    assert not torch.equal(half, before)


# Going on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("killed_after", [2, 3, 5])
def test_a_killed_run_goes_on_with_the_same_bits(dtype, killed_after, tmp_path):
    def run():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)).to(dtype)
        return model, GaLoreAdamW(model.parameters(), lr=0.05, r=4, refresh=3, weight_decay=0.1)

    def steps(model, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()

    whole, its = run()
    steps(whole, its, range(8))
    killed, before = run()
    steps(killed, before, range(killed_after))
    save_checkpoint(tmp_path / "checkpoint", killed, before, killed_after, {})
    resumed, after = run()
    assert restore(read_checkpoint(tmp_path / "checkpoint"), resumed, after, {}) == killed_after
    steps(resumed, after, range(killed_after, 8))
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name, state in its.state[theirs].items():
            assert torch.equal(torch.as_tensor(after.state[mine][name]), torch.as_tensor(state))


def test_a_loaded_state_is_a_copy():
    W = nn.Parameter(torch.randn(20, 12))
    optimizer = GaLoreAdamW([W], r=4)
    stepped(optimizer, W, gradients_of((20, 12), 1))
    other = GaLoreAdamW([nn.Parameter(W.detach().clone())], r=4, lr=5.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 1e-3
    before = optimizer.state[W]["M"].clone()
    stepped(other, other.param_groups[0]["params"][0], gradients_of((20, 12), 2))
    assert torch.equal(optimizer.state[W]["M"], before)


def test_a_state_that_does_not_fit_is_refused():
    W = nn.Parameter(torch.randn(20, 12))
    optimizer, other = GaLoreAdamW([W], r=4), GaLoreAdamW([nn.Parameter(torch.randn(12, 20))], r=4)
    stepped(optimizer, W, gradients_of((20, 12), 1))
    with pytest.raises(ValueError, match=r"parameter 0: it has .*'P': \(4, 12\).*\{'P': \(12, 4\)"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    two = GaLoreAdamW([nn.Parameter(torch.randn(20, 12)), nn.Parameter(torch.randn(3))], r=4)
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, the optimizer has \[2\]"):
        two.load_state_dict(optimizer.state_dict())


# Training


class TinyModel(nn.Module):
    """A language model with a memory of one token, shaped as `train` wants it: `.model` and `.lm_head`."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 16))
        self.lm_head = nn.Linear(16, 12, bias=False)


def test_it_trains_whole_weights_in_the_trainer():
    torch.manual_seed(0)
    model = TinyModel()
    batch = collate([mask_prompt([1, 2], [3, 4, 5], eos=0), mask_prompt([6], [7], eos=0)], pad=0)
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not model.model[0].weight]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizer = GaLoreAdamW([{"params": matrices}, {"params": others, "r": None}], lr=0.05, r=4, refresh=10)
    training = train(model, [batch] * 60, optimizer)
    assert training.steps[-1].loss < training.steps[0].loss / 10
    assert optimizer.report().n_projected == 2


# Refusals


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"r": 0}, {"refresh": 0}, {"scale": 0.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -1}],
)
def test_a_setting_out_of_its_range_is_refused(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} = "):
        GaLoreAdamW([nn.Parameter(torch.zeros(3, 4))], **settings)
    optimizer = GaLoreAdamW([nn.Parameter(torch.zeros(3, 4))])
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} = "):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 4))], **settings})
    assert len(optimizer.param_groups) == 1


def test_a_gradient_without_singular_vectors_changes_nothing():
    params = [nn.Parameter(torch.randn(20, 12)) for _ in range(2)]
    optimizer = GaLoreAdamW(params, r=4)
    before = [p.detach().clone() for p in params]
    for p, gradient in zip(params, gradients_of((20, 12), 2), strict=True):
        p.grad = gradient
    params[1].grad[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"a gradient of shape \(20, 12\) holds NaN"):
        optimizer.step()
    params[1].grad = torch.eye(20)[:, :12].to_sparse()
    with pytest.raises(ValueError, match="a gradient is sparse"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not any("M" in optimizer.state[p] for p in params)


def test_a_closure_is_called_and_a_parameter_without_gradient_rests():
    W, rests = nn.Parameter(torch.randn(20, 12)), nn.Parameter(torch.randn(20, 12))
    optimizer = GaLoreAdamW([W, rests], r=4)

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    before = rests.detach().clone()
    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert torch.equal(rests, before)


def test_a_refused_step_leaves_no_trace():
    W = torch.nn.Parameter(torch.ones(8, 12))
    optimizer = GaLoreAdamW([W], r=2)
    W.grad = torch.full_like(W, torch.nan)
    with pytest.raises(ValueError, match="has no SVD"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # as it was


@pytest.mark.parametrize("settings", [{"r": 2.5}, {"r": True}, {"refresh": 1.5}])
def test_counts_are_whole_numbers(settings):
    with pytest.raises(ValueError, match="whole numbers of 1 or more"):
        GaLoreAdamW([{"params": [torch.nn.Parameter(torch.ones(8, 12))], **settings}])
