"""What was planted is found: the elbow of a rank sweep lies at the planted rank, and AdaLoRA's ranks where it was."""

import pytest
import torch

from minilora.train.planted import PLANTED, SIZE, divergence, elbow, loss_of_rank, plant, ranks_found, small_model

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("k", [1, 3])
def test_the_teacher_differs_by_an_update_of_rank_k_with_equal_singular_values(k):
    student = small_model(0)
    teacher = plant(student, PLANTED, k, SIZE, torch.Generator().manual_seed(1))
    for name, module in student.named_modules():
        if isinstance(module, torch.nn.Linear):
            delta = (teacher.get_submodule(name).weight - module.weight).detach().double()
            values = torch.linalg.svdvals(delta)
            if name in PLANTED:
                size = SIZE * module.weight.norm().item()
                # float32: the sum W + ΔW rounds each number to 2⁻²⁴ of itself, the norm of all to less than 1e-5
                torch.testing.assert_close(values[:k], torch.full((k,), size / k**0.5).double(), rtol=1e-5, atol=0)
                assert values[k:].max() < 1e-5 * values[0]
            else:
                assert not values.any()


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(ValueError, match="k is 49"):
        plant(small_model(0), PLANTED, 49, SIZE, torch.Generator())
    with pytest.raises(ValueError, match="multiple of the 14 layers"):
        ranks_found(k=3, seed=0)


def test_the_loss_is_zero_where_student_and_teacher_agree_and_the_kl_elsewhere():
    student, tokens = small_model(0), torch.arange(32).reshape(2, 16)
    assert divergence(student, student, tokens).abs() < 1e-6
    teacher = plant(student, PLANTED, 2, SIZE, torch.Generator().manual_seed(0))
    p, q = (torch.softmax(model(tokens).double(), -1) for model in (teacher, student))
    by_hand = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(student, teacher, tokens).double(), by_hand, rtol=1e-4, atol=0)


def test_the_elbow_is_the_smallest_rank_within_the_noise_of_the_best():
    assert elbow({1: [0.9, 1.1], 2: [0.52, 0.4], 4: [0.06, 0.05], 8: [0.0, 0.01]}) == 4  # the band is 0.34 / 4
    assert elbow({1: [0.9, 0.91], 2: [0.52, 0.5], 4: [0.06, 0.05], 8: [0.0, 0.01]}) == 8  # and here 0.05 / 4
    assert elbow({2: [0.0, 0.0], 1: [0.0, 0.0]}) == 1
    with pytest.raises(ValueError, match="two or more"):
        elbow({1: [0.9], 2: [0.5, 0.4]})


def test_a_rank_below_the_planted_one_leaves_much_and_the_planted_one_nothing():
    assert loss_of_rank(r=1, k=2, seed=0, steps=200) > 0.2
    assert loss_of_rank(r=2, k=2, seed=0, steps=200) < 0.01


@pytest.mark.long
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_elbow_is_at_the_planted_rank(k):
    ranks = sorted({max(1, k // 2), max(1, k - 1), k, k + 1, 2 * k})
    assert elbow({r: [loss_of_rank(r, k, seed) for seed in SEEDS] for r in ranks}) == k


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_adalora_puts_its_ranks_where_the_update_was_planted(seed):
    ranks = ranks_found(k=7, seed=seed)
    assert sum(ranks.values()) == 14
    # what a last triplet of noise beats is decided by rounding, which differs between CPUs; by chance it would be 2
    assert sum(ranks[name] for name in PLANTED) >= 13
    assert all(abs(ranks[name] - 7) <= 2 for name in PLANTED)
