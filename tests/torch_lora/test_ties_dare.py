"""TIES and DARE against the papers' rules written out on whole matrices."""

import pytest
import torch
from test_arithmetic import Largest, adapters_of, dense, dense_sum, random_update, relative
from torch import Tensor

from minilora.torch_lora import ties_dare
from minilora.torch_lora.arithmetic import svd
from minilora.torch_lora.ties_dare import dare, kth_largest_magnitude, low_rank, ties
from minilora.torch_lora.updates import Update

FULL = 99  # a rank above the layer's: nothing is cut
FLOAT32_SVD = 1e-5  # a product of factors in float32, of a matrix of rank 20, against the matrix itself


def ties_by_the_paper(deltas: list[Tensor], density: float) -> Tensor:
    """[TIES] algorithm 1, on whole matrices, entry by entry."""
    trimmed = []
    for delta in deltas:
        order = delta.abs().flatten().argsort(descending=True)
        kept = torch.zeros(delta.numel())
        kept[order[: round(density * delta.numel())]] = 1
        trimmed.append(delta * kept.reshape(delta.shape))
    M = torch.zeros_like(deltas[0])
    for row in range(M.shape[0]):
        for column in range(M.shape[1]):
            entries = [t[row, column].item() for t in trimmed]
            winners = [entry for entry in entries if entry * sum(entries) > 0]
            M[row, column] = sum(winners) / len(winners) if winners else 0.0
    return M


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -1.3, 2.0]])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_without_a_cut_is_the_papers(density, weights):
    adapters = adapters_of(2, 3, 4, layers={"q": (20, 30)})
    combined = ties(adapters, weights, r=FULL, density=density)
    meant = ties_by_the_paper([w * dense(a["q"]) for a, w in zip(adapters, weights, strict=True)], density)

    assert combined.updates["q"].r == 20
    assert relative(dense(combined.updates["q"]), meant) < FLOAT32_SVD
    told = combined.report.layers["q"]
    assert told.from_meant.relative < FLOAT32_SVD
    off = relative(dense(combined.updates["q"]), dense_sum(adapters, weights, "q"))
    assert told.from_sum.relative == pytest.approx(off, rel=1e-6)


def test_an_adapter_combined_with_itself_by_ties_is_itself():
    [adapter] = adapters_of(3)
    combined = ties([adapter, adapter], [1.0, 1.0], r=3, density=1.0)

    for name, update in combined.updates.items():
        assert relative(dense(update), dense(adapter[name])) < FLOAT32_SVD
    assert combined.report.from_sum.relative == pytest.approx(0.5, rel=1e-5)  # the sum is twice as much


def test_an_adapter_against_itself_by_ties_is_nothing():
    [adapter] = adapters_of(3)
    combined = ties([adapter, adapter], [1.0, -1.0], r=3, density=1.0)

    assert all(not dense(update).any() for update in combined.updates.values())


def test_a_negative_weight_turns_the_signs_before_they_are_elected():
    one = {"q": Update(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0]]))}
    two = {"q": Update(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0]]))}
    combined = ties([one, two], [1.0, -1.0], r=2, density=1.0)

    # entries 3 and −2: the 3 wins; 3 and 2: their mean. With unturned signs the first would be (3 − 2) / 2
    torch.testing.assert_close(dense(combined.updates["q"]), torch.tensor([[3.0, 2.5]]).double())


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_dare_is_the_sum_on_average_with_the_spread_it_should_have(density):
    adapters, weights = adapters_of(2, 3, layers={"q": (80, 60)}), [0.7, -1.3]
    combined = dare(adapters, weights, r=FULL, density=density, seed=3)
    one, two = (w * dense(a["q"]) for a, w in zip(adapters, weights, strict=True))
    off = dense(combined.updates["q"]) - one - two
    # each entry's noise is δ·x with x = mask/density − 1: E x² and E x⁴ of a coin, and the variance of (δ₁x₁ + δ₂x₂)²
    x2, x4 = 1 / density - 1, (1 - density) + (1 - density) ** 4 / density**3
    expected = x2 * (one**2 + two**2).sum()
    spread = ((x4 - x2**2) * (one**4 + two**4) + 4 * x2**2 * one**2 * two**2).sum().sqrt()

    assert abs(off.square().sum() - expected) < 4 * spread
    assert spread < 0.2 * expected  # or the line above would say little
    assert abs(off.sum()) < 4 * expected.sqrt()
    assert combined.report.layers["q"].from_sum.error == pytest.approx(off.norm().item(), rel=1e-5)


def test_dare_leaves_entries_out_or_rescales_them():
    adapter = {"q": random_update(30, 20, 3)}
    made, delta = dense(dare([adapter], [2.0], r=FULL, density=0.25, seed=1).updates["q"]), 2 * dense(adapter["q"])
    ratio = made / delta
    sure = delta.abs() > 0.5  # elsewhere the SVD's rounding is large in a ratio

    assert all(min(abs(x), abs(x - 4)) < 1e-3 for x in ratio[sure].tolist())
    assert 0.15 < (ratio[sure] > 2).double().mean() < 0.35


def test_masks_come_from_the_seed_alone(monkeypatch):
    adapters = adapters_of(2, 3)

    def made(seed: int) -> Tensor:
        return dense(dare(adapters, [1.0, 1.0], r=FULL, density=0.5, seed=seed).updates["v"])

    torch.manual_seed(1)
    first = made(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(made(0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative(made(1), first) > 0.1
    monkeypatch.setattr(ties_dare, "CHUNK", 170)
    assert relative(made(0), first) < FLOAT32_SVD


def test_layers_and_adapters_have_masks_of_their_own():
    update = random_update(30, 20, 3)
    made = dare([{"q": update, "v": update}], [1.0], r=FULL, density=0.5).updates
    assert relative(dense(made["q"]), dense(made["v"])) > 0.1

    cancelled = dare([{"q": update}, {"q": update}], [1.0, -1.0], r=FULL, density=0.5).updates
    assert dense(cancelled["q"]).norm() > 0.1 * dense(update).norm()


def test_density_1_keeps_everything():
    adapters = adapters_of(2, 3)

    assert dare(adapters, [1.0, -2.0], r=5, density=1.0).report.from_sum.relative < FLOAT32_SVD


@pytest.mark.parametrize("method", [ties, dare])
def test_only_a_few_rows_are_there_at_once(method, monkeypatch):
    adapters = adapters_of(2, 2, layers={"q": (400, 300)})
    whole = method(adapters, [1.0, 1.0], r=3, density=0.5)
    monkeypatch.setattr(ties_dare, "CHUNK", 10 * 300)
    with Largest() as largest:
        chunked = method(adapters, [1.0, 1.0], r=3, density=0.5)

    assert largest.numbers <= 2 * 10 * 300  # ten rows of two adapters; the factors with 11 columns are smaller
    torch.testing.assert_close(dense(chunked.updates["q"]), dense(whole.updates["q"]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("k", [1, 2, 100, 4999, 5000])
def test_the_kth_largest_magnitude_is_exact(k):
    numbers = torch.cat([torch.randn(4000), torch.randn(900) * 1e-40, torch.zeros(50), torch.full((50,), -3e38)])
    numbers = numbers[torch.randperm(5000)]
    pieces = numbers.split(777)

    assert (
        kth_largest_magnitude(lambda: ((slice(0), piece) for piece in pieces), k)
        == sorted(numbers.abs().tolist(), reverse=True)[k - 1]
    )


@pytest.mark.parametrize("r", [1, 4, 16])
def test_the_cut_is_within_two_percent_of_the_best_one_on_pure_noise(r):
    """Noise is the worst case: its singular values hardly decay."""
    M = torch.randn(150, 200)
    generator = torch.Generator().manual_seed(0)
    update = low_rank(lambda: ((slice(i, i + 40), M[i : i + 40]) for i in range(0, 150, 40)), (150, 200), r, generator)
    best = torch.linalg.svdvals(M)[r:].norm()

    assert update.r == r
    assert best * (1 - 1e-5) <= (dense(update) - M).norm() < 1.02 * best


def test_after_the_cut_both_errors_are_those_of_whole_matrices():
    adapters, weights = adapters_of(2, 3, layers={"q": (20, 30)}), [1.0, -0.5]
    combined = ties(adapters, weights, r=4, density=0.4)
    deltas = [w * dense(a["q"]) for a, w in zip(adapters, weights, strict=True)]
    meant, made, told = ties_by_the_paper(deltas, 0.4), dense(combined.updates["q"]), combined.report.layers["q"]

    assert combined.updates["q"].r == 4
    assert told.from_meant.relative == pytest.approx(relative(made, meant), rel=1e-4)
    assert told.from_sum.relative == pytest.approx(relative(made, sum(deltas)), rel=1e-4)
    assert svd(adapters, weights, r=4).report.from_sum.error < told.from_sum.error


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_densities_are_refused(density):
    for method in (ties, dare):
        with pytest.raises(ValueError, match="density is"):
            method(adapters_of(2), [1.0], r=2, density=density)
