"""The numbers behind lesson 09, against torch, PEFT and the closed forms that its derivation gives."""

import numpy as np
import pytest
import torch

from minilora.classroom import plots
from minilora.classroom.merging import (
    FORMATS,
    OWN_INPUT,
    RATIOS,
    drift,
    merge_as,
    merge_errors,
    random_layer,
    share_that_moves,
    to_bfloat16,
)


def test_rounding_to_bfloat16_is_torchs():
    ties = 1 + np.arange(512) / 256  # every second one lies halfway between two bfloat16 numbers
    tiny = np.array([0.0, -0.0, 1e-40, -1e-40, 3e38])
    numbers = np.concatenate([np.random.default_rng(0).normal(size=5000), ties, -ties, tiny]).astype(np.float32)

    assert np.array_equal(to_bfloat16(numbers), torch.from_numpy(numbers).bfloat16().float().numpy())


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_share_of_weights_that_move_is_an_arctangent(ratio: float):
    W, A, B = random_layer(256, 16)

    assert merge_as("bfloat16", W, ratio * B @ A).changed == pytest.approx(share_that_moves(ratio), abs=0.02)


def test_what_a_merge_loses_in_bfloat16_and_nf4():
    W, A, B = random_layer(1024, 16)
    off = {
        (stored_as, ratio): merge_as(stored_as, W, ratio * B @ A).error
        for stored_as, ratio in [("bfloat16", 8e-4), ("bfloat16", 8e-3), ("NF4", 0.01), ("NF4", 0.1), ("NF4", 0.3)]
    }

    assert 0.80 < off["bfloat16", 8e-4] < 0.87  # four fifths of the effect, and more
    assert 0.19 < off["bfloat16", 8e-3] < 0.22
    assert 1.05 < off["NF4", 0.01] < 1.10  # worse than not merging
    assert 0.72 < off["NF4", 0.1] < 0.82
    assert 0.29 < off["NF4", 0.3] < 0.34


def test_where_every_weight_moves_the_error_is_a_rounding_step_over_the_effect():
    errors, at = merge_errors(256, 16, ratios=(0.03, 0.08)), (0.03, 0.08)
    in_bfloat16 = np.multiply(errors["bfloat16"], at)
    in_float32 = np.multiply(errors["float32"], at)

    np.testing.assert_allclose(in_bfloat16, 0.0017, rtol=0.05)  # step / √12, half-way between 2⁻⁸ and 2⁻⁷ of a weight
    np.testing.assert_allclose(in_bfloat16 / in_float32, 2**16, rtol=0.05)


def test_on_the_adapters_own_inputs_noise_counts_r_of_d_and_what_is_missing_counts_in_full():
    anywhere, own = (merge_errors(256, 16, *inputs, ratios=(0.01, 0.3)) for inputs in ((), (OWN_INPUT,)))

    assert own["bfloat16"][1] / anywhere["bfloat16"][1] == pytest.approx(np.sqrt(16 / 256), rel=0.1)
    assert own["NF4"][0] == pytest.approx(1 - 1 / 64, abs=0.01)  # one weight of a block of 64 arrives: the largest


def test_the_same_adapter_does_its_damage_once_and_new_ones_walk_at_random():
    W, A, B = random_layer(128, 8)
    others = (0.3 * b @ a for _, a, b in (random_layer(128, 8, seed) for seed in range(1, 101)))
    same, walk = drift(W, [0.3 * B @ A] * 100), drift(W, others)

    assert same[99] == pytest.approx(same[0], rel=0.01)
    assert 8 < walk[99] / walk[0] < 12  # √100


def test_a_cycle_that_adds_exactly_and_subtracts_rounded_is_pefts():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False)).bfloat16()
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    before = layer.base_layer.weight.detach().float().numpy().copy()
    predicted = drift(before, [layer.get_delta_weight("default").detach().numpy()] * 30, round_first=True)
    for cycle in range(30):
        model.merge_adapter()
        model.unmerge_adapter()
        now = layer.base_layer.weight.detach().float().numpy()
        assert np.linalg.norm(now - before) / np.linalg.norm(before) == pytest.approx(predicted[cycle], rel=1e-5)

    assert predicted[29] > 2 * predicted[0]


def test_the_figures_are_the_same_bytes_each_time():
    W, A, B = random_layer(64, 3)
    one = merge_as("NF4", W, 0.1 * B @ A)
    pair = one.meant[0], one.arrived[0]
    points = {name: [(0.1, 0.5)] for name in FORMATS}
    draw = [
        lambda: plots.merge_error(RATIOS, merge_errors(64, 4), "NF4", 0.03, pair),
        lambda: plots.arrivals({"1": pair, "2": pair}),
        lambda: plots.drifts({"same": [1e-3] * 100, "walk": np.linspace(1e-3, 1e-2, 100).tolist()}),
        lambda: plots.real_merges(RATIOS, merge_errors(64, 4), points, points),
    ]

    assert all(plots.png(figure()) == plots.png(figure()) for figure in draw)
