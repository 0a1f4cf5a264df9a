"""Sums of adapters against dense sums in float64: exact, best of their rank, or with the error that they tell."""

import inspect
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from minilora.qlora import NF4Linear, QLoRALinear
from minilora.torch_lora import LoRALinear, inject, load_adapter, lora_layer, merged, remove, save_adapter, train_biases
from minilora.torch_lora.arithmetic import Distance, cat, check_rank, linear, svd
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.ties_dare import ties
from minilora.torch_lora.updates import Update, set_updates, updates_of

WEIGHTS = [0.7, -1.3, 2.0]
FLOAT32 = 2**-24  # half a step of a number near 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)  # always the same base
        self.q_proj, self.v_proj, self.out = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.v_proj(self.q_proj(x)))


def random_update(out_features: int, in_features: int, r: int, scaling: float = 1.0) -> Update:
    return Update(torch.randn(r, in_features), torch.randn(out_features, r), scaling)


def adapters_of(*ranks: int, layers: dict[str, tuple[int, int]] | None = None) -> list[dict[str, Update]]:
    """Adapters with these ranks, of scalings 1.5, 2.5, …"""
    layers = layers or {"q": (40, 30), "v": (20, 50)}
    return [{n: random_update(*shape, r, i + 1.5) for n, shape in layers.items()} for i, r in enumerate(ranks)]


def dense(update: Update) -> Tensor:
    return update.scaling * update.B.double() @ update.A.double()


def dense_sum(adapters: list[dict[str, Update]], weights: list[float], name: str) -> Tensor:
    return sum(w * dense(adapter[name]) for adapter, w in zip(adapters, weights, strict=True) if name in adapter)


def relative(made: Tensor, meant: Tensor) -> float:
    return ((made - meant).norm() / meant.norm()).item()


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.numbers = max(self.numbers, *(t.numel() for t in made if isinstance(t, Tensor)), 0)
        return result


def test_cat_is_the_sum_with_any_ranks_scalings_and_signs():
    adapters = adapters_of(2, 3, 5)
    combined = cat(adapters, WEIGHTS)

    assert [update.r for update in combined.updates.values()] == [10, 10]
    for name, update in combined.updates.items():
        assert update.scaling == 1.0
        assert relative(dense(update), dense_sum(adapters, WEIGHTS, name)) < FLOAT32
        assert torch.equal(update.A, torch.cat([adapter[name].A for adapter in adapters]))  # not touched at all


def test_cat_rounds_nothing_where_weights_times_scalings_are_powers_of_two():
    adapters = [{"q": random_update(9, 7, 2, 2.0)}, {"q": random_update(9, 7, 3, 0.5)}]
    combined = cat(adapters, [0.5, -1.0])

    assert torch.equal(combined.updates["q"].B, torch.cat([adapters[0]["q"].B, -0.5 * adapters[1]["q"].B], dim=1))
    assert combined.report.from_sum.relative < 1e-15  # what float64 makes of a difference of equal products


@pytest.mark.parametrize("r", [1, 4, 9])
def test_svd_is_the_best_of_its_rank_and_tells_what_it_dropped(r):
    adapters = adapters_of(2, 3, 5)
    combined = svd(adapters, WEIGHTS, r=r)
    for name, update in combined.updates.items():
        meant = dense_sum(adapters, WEIGHTS, name)
        sigma = torch.linalg.svdvals(meant)
        dropped = (sigma[r:].norm() / sigma.norm()).item()
        told = combined.report.layers[name].from_sum

        assert update.r == r
        assert told.relative == pytest.approx(dropped, rel=1e-6)
        assert told.relative == pytest.approx(relative(dense(update), meant), rel=1e-6)
        assert told.norm == pytest.approx(meant.norm().item(), rel=1e-12)


def test_svd_of_the_full_rank_or_more_is_the_sum():
    adapters = adapters_of(2, 3)
    combined = svd(adapters, [1.0, 1.0], r=99)

    assert [update.r for update in combined.updates.values()] == [5, 5]
    assert combined.report.from_sum.relative < 4 * FLOAT32  # A and B are rounded, and √σ shares σ between them


def test_adapters_of_more_ranks_than_the_layer_has_rows_still_have_an_svd():
    adapters = adapters_of(5, 6, layers={"q": (7, 4)})
    combined = svd(adapters, [1.0, 1.0], r=3)
    sigma = torch.linalg.svdvals(dense_sum(adapters, [1.0, 1.0], "q"))

    assert combined.report.from_sum.relative == pytest.approx((sigma[3:].norm() / sigma.norm()).item(), rel=1e-6)


def test_linear_adds_as_and_bs_apart_and_tells_how_far_that_is_from_the_sum():
    adapters, weights = adapters_of(3, 3), [0.7, -1.3]
    combined = linear(adapters, weights)
    for name, update in combined.updates.items():
        terms = [(w * a[name].scaling, a[name]) for a, w in zip(adapters, weights, strict=True)]
        meant = dense_sum(adapters, weights, name)
        (c1, one), (c2, two) = terms
        crosses = abs(c1 * c2) ** 0.5 * (two.B @ one.A - one.B @ two.A).double()  # signs go with A

        torch.testing.assert_close(dense(update) - meant, crosses, rtol=0, atol=1e-4)
        assert combined.report.layers[name].from_sum.relative == pytest.approx(relative(dense(update), meant), rel=1e-6)


def test_the_cross_terms_of_unrelated_adapters_are_as_large_as_the_sum():
    adapters = [{"q": random_update(400, 400, 4)} for _ in range(2)]

    assert linear(adapters, [1.0, 1.0]).report.from_sum.relative == pytest.approx(1.0, abs=0.1)


def test_linear_is_right_for_one_adapter_and_never_nearer_than_the_svd():
    adapters = adapters_of(4, 4)

    assert linear(adapters[:1], [-0.3]).report.from_sum.relative < 4 * FLOAT32
    assert svd(adapters, [1, 1], r=4).report.from_sum.error < linear(adapters, [1, 1]).report.from_sum.error


def test_linear_refuses_different_ranks_and_names_the_layers():
    with pytest.raises(ValueError, match=r"q: ranks \[2, 3\]\n  v: ranks \[2, 3\]"):
        linear(adapters_of(2, 3), [1.0, 1.0])


@pytest.mark.parametrize("combine", [cat, linear, lambda a, w: svd(a, w, r=3)], ids=["cat", "linear", "svd"])
def test_no_matrix_as_large_as_the_layer_is_made(combine):
    adapters = adapters_of(3, 3, layers={"q": (200, 300)})
    with Largest() as largest:
        combine(adapters, [1.0, -2.0])

    assert largest.numbers <= 300 * 4 * 3  # what was made and what was meant, side by side: 3 or 6 columns and 6


def test_a_layer_that_one_adapter_leaves_alone_adds_nothing_there():
    both, one = adapters_of(2, 2)
    del one["v"]
    combined = cat([both, one], [1.0, 3.0])

    assert (combined.updates["q"].r, combined.updates["v"].r) == (4, 2)
    torch.testing.assert_close(dense(combined.updates["v"]), dense(both["v"]), rtol=1e-6, atol=1e-6)
    assert linear([both, one], [1.0, 3.0]).report.layers["v"].from_sum.relative < 4 * FLOAT32


@pytest.mark.parametrize("combine", [cat, partial(svd, r=2), partial(ties, r=2, density=1.0)])
def test_an_adapter_minus_itself_is_nothing_and_its_rounding_is_no_error(combine):
    [adapter] = adapters_of(3, layers={"q": (40, 30), "v": (700, 300)})
    report = combine([adapter, adapter], [1.0, -1.0]).report

    assert (report.from_sum, report.from_sum.relative) == (Distance(0.0, 0.0), 0.0)
    assert combine([adapter] * 3, [0.3, 0.7, -1.0]).report.from_sum.norm == 0.0  # each product is rounded


def test_what_is_left_of_a_difference_is_told_down_to_the_rounding_of_its_terms():
    [adapter] = adapters_of(3)
    nearly = {name: Update(y.A, y.B, y.scaling * (1 + 1e-13)) for name, y in adapter.items()}
    report = cat([adapter, nearly], [1.0, -1.0]).report

    assert report.layers["q"].from_sum.norm == pytest.approx(1e-13 * dense(adapter["q"]).norm().item(), rel=0.02)


def test_a_distance_from_nothing_is_nothing_or_infinite():
    assert Distance(0.0, 0.0).relative == 0.0
    assert Distance(0.1, 0.0).relative == float("inf")


def test_the_error_of_all_layers_is_that_of_one_matrix_with_all_of_them_in_it():
    adapters = adapters_of(3, 3)
    combined = svd(adapters, [1.0, 2.0], r=2)
    meant = torch.block_diag(*(dense_sum(adapters, [1.0, 2.0], name) for name in ("q", "v")))
    made = torch.block_diag(*(dense(combined.updates[name]) for name in ("q", "v")))

    assert combined.report.from_sum.relative == pytest.approx(relative(made, meant), rel=1e-6)


def test_the_report_prints_as_a_table():
    lines = str(svd(adapters_of(3, 3), [1.0, 2.0], r=2).report).splitlines()

    assert lines[0].split("  ")[0].startswith("svd, r=2")
    assert [line.split()[0] for line in lines[1:]] == ["q", "v", "all"]
    assert all(len(line) == len(lines[0]) for line in lines)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, w: ([], []), "0 adapters and 0 weights"),
        (lambda a, w: (a, w[:1]), "2 adapters and 1 weights: give one weight for each"),
        (lambda a, w: (a, [1.0, float("nan")]), "weight 1 is nan"),
        (lambda a, w: (a, [1e39, 1.0]), r"weight 0 is 1e\+39: a finite number that float32 holds"),
        (lambda a, w: (a, [1.0, -3e38]), r"is more than float32 holds in \['q', 'v'\]: choose smaller weights"),
        (lambda a, w: ([a[0], {"q": random_update(9, 9, 2)}], w), r"q: updates of shapes \[\(9, 9\), \(40, 30\)\]"),
        (lambda a, w: ([a[0], {"q": Update(torch.full((1, 30), float("inf")), torch.ones(40, 1))}], w), "q: holds NaN"),
        (lambda a, w: ([{}, {}], w), "they have no layers"),
    ],
)
def test_impossible_sums_are_refused(spoil, message):
    adapters, weights = spoil(adapters_of(2, 2), [1.0, 1.0])
    with pytest.raises(ValueError, match=message):
        cat(adapters, weights)


@pytest.mark.parametrize("r", [0, -1, 2.5])
def test_impossible_ranks_are_refused(r):
    with pytest.raises(ValueError, match=rf"r is {r}: .* a whole number of 1 or more"):
        inspect.unwrap(check_rank)(r)  # without the tests' own check of types


def adapted(targets: list[str], **settings) -> nn.Module:
    model = Model()
    inject(model, targets, lambda base: LoRALinear(base, **({"r": 2, "alpha": 3} | settings)))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.B)
    return model


def test_a_sum_of_models_adapters_is_the_sum_of_what_they_do():
    first, second = adapted(["q_proj"], use_rslora=True), adapted(["q_proj", "v_proj"], r=3, alpha=9)
    combined = cat([updates_of(first), updates_of(second)], [0.5, 2.0])
    model, x = Model(), torch.randn(5, 8)
    report = set_updates(model, combined.updates)

    assert report.hits == {"q_proj": ["q_proj"], "v_proj": ["v_proj"]}
    q = 0.5 * first.q_proj.delta_weight() + 2 * second.q_proj.delta_weight()
    torch.testing.assert_close(model.q_proj.delta_weight(), q)
    torch.testing.assert_close(model.v_proj.delta_weight(), 2 * second.v_proj.delta_weight())
    assert model.q_proj.scaling == model.v_proj.scaling == 1.0
    bare = Model()
    torch.testing.assert_close(model.q_proj(x), bare.q_proj(x) + x @ q.T)


def test_what_set_updates_made_is_saved_and_opened_with_ranks_filled_up(tmp_path):
    first, second = adapted(["q_proj"]), adapted(["q_proj", "v_proj"], r=3)
    model = Model()
    set_updates(model, cat([updates_of(first), updates_of(second)], [1.0, -1.0]).updates)
    save_adapter(model, tmp_path)
    opened, x = Model(), torch.randn(5, 8)
    load_adapter(opened, tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config.get("use_rslora")) == (5, 5, None)
    filled = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.v_proj.lora_A.weight"]
    assert filled.shape == (5, 6)
    assert not filled[3:].any()
    assert torch.equal(opened(x), model(x))


def test_updates_are_copies_also_of_merged_layers():
    model = adapted(["q_proj"])
    with merged(model):
        updates = updates_of(model)
    before = dense(updates["q_proj"])
    with torch.no_grad():
        model.q_proj.B.zero_()

    assert torch.equal(dense(updates["q_proj"]), before)
    assert before.any()
    assert not updates["q_proj"].A.requires_grad


def test_embeddings_and_conv1d_are_summed_and_set_like_linear_layers():
    def gpt2() -> nn.Module:
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=23, n_positions=8)).eval()

    models = [gpt2(), gpt2()]
    for model in models:
        inject(model, ["c_attn", "wte"], lambda base: lora_layer(base, r=2, alpha=3))
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.A), nn.init.normal_(layer.B)
    target = gpt2()
    set_updates(target, cat([updates_of(model) for model in models], [1.0, -0.5]).updates)
    for name, layer in adapter_layers(target).items():
        deltas = [adapter_layers(model)[name].delta_weight() for model in models]
        torch.testing.assert_close(layer.delta_weight(), deltas[0] - 0.5 * deltas[1])


def test_updates_can_be_set_over_four_bits():
    updates, model = updates_of(adapted(["q_proj"])), Model()
    set_updates(model, updates, QLoRALinear)

    assert isinstance(model.q_proj.base, NF4Linear)
    torch.testing.assert_close(model.q_proj.delta_weight().double(), dense(updates["q_proj"]), rtol=0, atol=1e-6)


def test_updates_that_do_not_fit_are_refused_all_at_once_and_the_model_is_as_before():
    model = Model()
    updates = {"q_proj": random_update(6, 9, 2), "k_proj": random_update(6, 8, 2), "v_proj": random_update(4, 6, 2)}
    with pytest.raises(
        ValueError, match=r"q_proj: the update is for \(in, out\) = \(9, 6\), it has \(8, 6\)\n  k_proj: "
    ):
        set_updates(model, updates)
    with pytest.raises(ValueError, match="there are none"):
        set_updates(model, {})

    assert not adapter_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_has_an_adapter_takes_no_second_one():
    model = adapted(["q_proj"])
    with pytest.raises(ValueError, match="an adapter already"):
        set_updates(model, updates_of(model))
    remove(model)
    with pytest.raises(ValueError, match="no adapter to take updates from"):
        updates_of(model)


def test_an_adapter_that_is_more_than_a_and_b_is_refused():
    class Scaled(LoRALinear):
        def adapter_tensors(self):
            return super().adapter_tensors() | {"magnitude": self.base.weight}

    model = Model()
    inject(model, ["q_proj"], lambda base: Scaled(base, r=2, alpha=3))
    with pytest.raises(ValueError, match=r"q_proj, .* with \['A', 'B', 'magnitude'\]"):
        updates_of(model)


def test_an_adapter_that_replaces_tensors_of_the_base_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, ["0"], lambda base: LoRALinear(base, r=2, alpha=2))
    train_biases(model)
    with pytest.raises(ValueError, match=r"also replaces 1 tensors of the base, such as 0\.base\.bias: no sum"):
        updates_of(model)
