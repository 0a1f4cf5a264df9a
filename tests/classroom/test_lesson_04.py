"""Lesson 04: other right answers score in full, mixtures are not named, and what the lesson measures with is right."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from minilora.classroom.exercises import examine
from minilora.classroom.lessons import lesson_module
from minilora.torch_lora import LoRALinear
from minilora.torch_lora.inject import freeze_all_but_adapters

lesson = lesson_module("04")
MODULE, FREEZE, GRADIENTS = lesson.EXERCISES


class Einsum(nn.Module):
    def __init__(self, base, *, r, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        for each in base.parameters():
            each.requires_grad = False
        bound = 1 / math.sqrt(base.in_features)
        self.register_parameter("A", nn.Parameter(torch.rand(r, base.in_features) * 2 * bound - bound))
        self.register_parameter("B", nn.Parameter(torch.zeros(base.out_features, r)))
        self.drop = nn.Dropout(dropout)
        self.alpha, self.r = alpha, r

    def forward(self, x):
        down = torch.einsum("...i,ri->...r", self.drop(x), self.A)
        return self.base(x).add(torch.einsum("...r,or->...o", down, self.B), alpha=self.alpha / self.r)

    def delta_weight(self):
        return torch.einsum("or,ri->oi", self.B, self.A) * self.alpha / self.r


class InFloat64(Einsum):
    def forward(self, x):
        wide = self.drop(x).double() @ self.A.double().T @ self.B.double().T
        return (self.base(x) + self.alpha / self.r * wide).to(x.dtype)


class Looped(Einsum):
    def forward(self, x):
        h, u = self.base(x), self.drop(x)
        for k in range(self.r):
            h = h + self.alpha / self.r * (u @ self.A[k])[..., None] * self.B[:, k]
        return h


@pytest.mark.parametrize("layer_class", [Einsum, InFloat64, Looped])
def test_layers_of_another_build_score_in_full(layer_class):
    assert examine(MODULE, layer_class).passed, examine(MODULE, layer_class).message


def test_other_ways_to_freeze_score_in_full():
    def by_name(model, lora_class):
        layers = [name for name, module in model.named_modules() if isinstance(module, lora_class)]
        wanted = {f"{name}.{letter}" for name in layers for letter in ("A", "B")}
        trains = total = 0
        for name, each in model.named_parameters():
            each.requires_grad = name in wanted
            total += each.numel()
            trains += each.numel() * each.requires_grad
        return trains, total

    def recursively(module, lora_class):
        counts = [recursively(child, lora_class) for child in module.children()]
        own = list(module.parameters(recurse=False))
        for each in own:
            each.requires_grad_(isinstance(module, lora_class))
        total = sum(each.numel() for each in own)
        trains = total if isinstance(module, lora_class) else 0
        return trains + sum(count[0] for count in counts), total + sum(count[1] for count in counts)

    def as_a_list(model, lora_class):
        return list(lesson.freeze_all_but_lora(model, lora_class))

    assert all(examine(FREEZE, answer).passed for answer in (by_name, recursively))
    assert examine(FREEZE, as_a_list).passed


def test_other_tests_of_gradients_score_in_full():
    def with_functional_call(layer, x):
        layer = copy.deepcopy(layer).eval().double()
        A, B = (each.detach().clone().requires_grad_() for each in (layer.A, layer.B + 0.3))
        rows = x.double().clone().requires_grad_()
        return torch.autograd.gradcheck(
            lambda x, A, B: functional_call(layer, {"A": A, "B": B}, (x,)), (rows, A, B), raise_exception=False
        )

    def central_differences(layer, x):
        layer = copy.deepcopy(layer).double().eval()
        with torch.no_grad():
            layer.B.copy_(torch.linspace(-1, 1, layer.B.numel()).reshape(layer.B.shape))
        rows = x.double().clone().requires_grad_()
        weights = torch.linspace(1, 2, len(layer(rows).flatten())).double()
        (layer(rows).flatten() * weights).sum().backward()
        with torch.no_grad():
            for each in (rows, layer.A, layer.B):
                for at in np.ndindex(*each.shape):
                    here, losses = each[at].item(), []
                    for step in (1e-4, -1e-4):
                        each[at] = here + step
                        losses.append((layer(rows).flatten() * weights).sum().item())
                    each[at] = here
                    found = 0.0 if each.grad is None else each.grad[at].item()
                    if abs((losses[0] - losses[1]) / 2e-4 - found) > 1e-6 * (1 + abs(found)):
                        return False
        return True

    def raising_inside(layer, x):
        try:
            prepared = copy.deepcopy(layer).to(torch.float64).train(False)
            nn.init.uniform_(prepared.B)
            return torch.autograd.gradcheck(
                lambda *_: prepared(inputs[0]),
                inputs := [x.double().clone().requires_grad_(), prepared.A, prepared.B],
            )
        except RuntimeError:
            return False

    for answer in (with_functional_call, central_differences, raising_inside):
        assert examine(GRADIENTS, answer).passed, examine(GRADIENTS, answer).message


def test_a_class_of_blanks_is_not_started_and_half_a_class_is():
    class Blank(nn.Module):
        def __init__(self, base, *, r, alpha, dropout=0.0): ...

        def forward(self, x): ...

    class NoForward(Einsum):
        def __init__(self, base, **settings):
            super().__init__(base, **settings)

        def forward(self, x): ...

    assert examine(MODULE, Blank).status == "not started"
    assert examine(MODULE, NoForward).status == "failed"
    assert "h: returned None: is there a `return`?" in examine(MODULE, NoForward).message


def test_two_mistakes_at_once_are_not_named_as_one():
    class NoScalingAndBothRandom(lesson.NoScaling, lesson.BothRandom):
        pass

    class TransposedAndUnfrozen(lesson.TransposedA, lesson.NotFrozen):
        pass

    for layer_class in (NoScalingAndBothRandom, TransposedAndUnfrozen):
        failure = examine(MODULE, layer_class).failure
        assert failure is not None and failure.bug is None


def test_the_check_does_not_depend_on_the_learner_s_random_numbers_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in range(3):
        assert examine(MODULE, Einsum).passed

    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reference_freezes_as_the_package_does():
    case = lesson.model_inputs(np.random.default_rng(0))
    ours, theirs = case["model"], copy.deepcopy(case["model"])
    lesson.freeze_all_but_lora(ours, LoRALinear)
    freeze_all_but_adapters(theirs)

    assert lesson.what_trains(ours) == lesson.what_trains(theirs)


def test_kept_bytes_are_the_input_and_the_narrow_middle():
    x = torch.randn(10, 6, requires_grad=True)
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=4)

    assert lesson.kept_bytes(nn.Linear(6, 5).requires_grad_(False), x) == 0
    assert lesson.kept_bytes(nn.Linear(6, 5), x) == 4 * 10 * 6
    assert lesson.kept_bytes(layer, x) == 4 * 10 * (6 + 2)


def test_what_is_planted_has_singular_values_3_2_1_and_is_what_the_batches_show():
    block, planted, batches = lesson.imitation(np.random.default_rng(1), dim=8, steps=2)
    x, y = batches[1]

    for update in planted.values():
        torch.testing.assert_close(torch.linalg.svdvals(update)[:3], torch.tensor([3.0, 2, 1]))
        assert torch.linalg.matrix_rank(update) == 3
    assert torch.equal(lesson.moved(block, planted)(x), y)
    assert not torch.equal(block(x), y)


def test_a_handmade_backward_is_autograd_s():
    case = lesson.gradient_inputs(np.random.default_rng(2))
    right, by_hand = (lesson.specimen(name, case) for name in ("a right layer", "a right layer by hand"))
    found = []
    for layer in (right, by_hand):
        nn.init.ones_(layer.B)
        x = case["x"].clone().requires_grad_()
        F.silu(layer(x)).sum().backward()
        found.append([x.grad, layer.A.grad, layer.B.grad])

    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_test_that_always_raises_is_told_its_message_and_its_line():
    def natural(layer, x):
        return torch.autograd.gradcheck(layer, (x,))

    result = examine(GRADIENTS, natural)

    assert result.failure is not None and result.failure.bug is not None
    assert result.failure.bug.name == "gradcheck as it is"
    assert "at least one input tensor to require gradient" in result.failure.returned
    assert "in the line: return torch.autograd.gradcheck(layer, (x,))" in result.failure.returned
