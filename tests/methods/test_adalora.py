"""AdaLoRA: the layer and its penalty against the equations, the budget against a book kept by hand, and resuming."""

import copy

import pytest
import torch
import torch.nn.functional as F
from edit_config import edit_config
from test_dora import BASES, Conv1D
from torch import nn

from minilora.methods import (
    AdaLoRAConv1D,
    AdaLoRALinear,
    IA3Linear,
    RankAllocator,
    RankSchedule,
    adalora_layer,
    dora_layer,
    orthogonality,
    rank_report,
    to_lora,
)
from minilora.methods.adalora import adalora_layers
from minilora.methods.peft_adalora import load_adalora, save_adalora
from minilora.qlora import NF4Linear
from minilora.torch_lora import (
    LoRAConv1D,
    LoRALinear,
    count_parameters,
    inject,
    load_adapter,
    peft_files,
    remove,
    save_adapter,
    train_biases,
    train_modules,
)
from minilora.torch_lora.adapter_layer import dense_weight
from minilora.torch_lora.consumers import acceptance
from minilora.torch_lora.inject import adapter_layers, lora_layers
from minilora.train.data import collate, mask_prompt
from minilora.train.trainer import train, whole_batch


def trained(base: nn.Module, **settings) -> AdaLoRALinear:
    """A layer in which all three are noise."""
    layer = adalora_layer(base, **({"r": 3, "alpha": 6} | settings))
    with torch.no_grad():
        for tensor in layer.adapter_tensors().values():
            tensor.normal_()
    return layer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]()


def as_the_paper_has_it(layer, x):
    """[AdaLoRA] eq. 3, with the weight formed whole."""
    W = dense_weight(layer.base, torch.float32)
    W = W.T if layer.stores_in_by_out else W
    return F.linear(x, W + layer.alpha / layer.r * layer.B @ torch.diag(layer.E) @ layer.A, layer.base.bias)


# The layer


def test_a_new_layer_changes_no_bit_and_draws_its_vectors_small(base):
    x = torch.randn(2, 5, 12)
    layer = adalora_layer(base, r=3, alpha=6)
    assert torch.equal(layer(x), base(x))
    wide = AdaLoRALinear(nn.Linear(2000, 2000), r=4, alpha=8)
    for tensor in (wide.A, wide.B):  # 8000 numbers: the error of a standard deviation is 0.02 / √16000
        assert abs(tensor.std().item() - 0.02) < 5 * 0.02 / 16000**0.5


def test_outputs_and_gradients_are_the_papers(base):
    layer, x = trained(base), torch.randn(2, 5, 12, requires_grad=True)
    ours, theirs = layer(x), as_the_paper_has_it(layer, x)
    wanted = [x, layer.A, layer.B, layer.E]
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for mine, its in zip(torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("make", [make for kind, make in BASES.items() if kind != "4 bits"])  # that is float32
def test_gradients_are_those_of_finite_differences(make):
    layer = trained(make()).double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    names = ["A", "B", "E"]

    def run(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, layer.A, layer.B, layer.E))


def test_merging_gives_the_live_output_and_unmerging_the_same_bits(base):
    layer, x = trained(base), torch.randn(5, 12)
    live = layer(x)
    torch.testing.assert_close(layer.fused()(x), live, rtol=1e-5, atol=2e-5)
    if isinstance(base, NF4Linear):
        with pytest.raises(TypeError, match="does not store floats"):
            layer.merge()
        return
    before = base.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), live, rtol=1e-5, atol=2e-5)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_dropout_leaves_the_bases_own_output_whole():
    x, layer = torch.randn(5, 12), trained(nn.Linear(12, 8), dropout=0.5).train()
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(
        ours, layer.base(x) + layer.scaling * (dropped @ layer.A.T * layer.E) @ layer.B.T, rtol=1e-5, atol=1e-5
    )


def test_it_says_what_it_wraps_and_trains_one_number_a_triplet_more_than_lora():
    with pytest.raises(TypeError, match="AdaLoRALinear wraps a linear layer"):
        adalora_layer(nn.Embedding(4, 8), r=2, alpha=4)
    with pytest.raises(ValueError, match="wrapped already"):
        adalora_layer(LoRALinear(nn.Linear(4, 4), r=2, alpha=4), r=2, alpha=4)
    assert isinstance(adalora_layer(Conv1D(8, 12), r=2, alpha=4), AdaLoRAConv1D)
    assert count_parameters(adalora_layer(nn.Linear(12, 8), r=3, alpha=6)).trainable == 3 * (12 + 8 + 1)


# The penalty


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 10), nn.Linear(10, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


NAMES = ["first", "second", "third"]


def adapted(r: int = 4, **settings) -> Model:
    model = Model()
    inject(model, NAMES, lambda base: adalora_layer(base, r=r, alpha=6, **settings))
    return model


def noisy(model: Model) -> Model:
    with torch.no_grad():
        for layer in adalora_layers(model).values():
            for tensor in layer.adapter_tensors().values():
                tensor.normal_(std=0.5)
    return model


def test_the_penalty_is_zero_where_the_vectors_are_orthonormal_and_the_papers_elsewhere():
    model = noisy(adapted()).double()
    layers = adalora_layers(model).values()
    distances = [
        sum(((m.T @ m) - torch.eye(4)).square().sum() for m in (layer.B, layer.A.T)) for layer in layers
    ]  # eq. 4, of each layer
    torch.testing.assert_close(orthogonality(model, squared=True), sum(distances), rtol=1e-12, atol=0)
    norms = [torch.linalg.norm(m.T @ m - torch.eye(4)) for layer in layers for m in (layer.B, layer.A.T)]
    torch.testing.assert_close(orthogonality(model), sum(norms) / 6, rtol=1e-12, atol=0)
    with torch.no_grad():
        for layer in layers:
            nn.init.orthogonal_(layer.A), nn.init.orthogonal_(layer.B)
    assert orthogonality(model) < 1e-14  # a few roundings of float64
    with pytest.raises(ValueError, match="no AdaLoRA layer: inject"):
        orthogonality(Model())


def test_a_step_down_the_penalty_brings_them_nearer():
    model = noisy(adapted())
    before = orthogonality(model)
    before.backward()
    with torch.no_grad():
        for layer in adalora_layers(model).values():
            assert layer.E.grad is None
            layer.A -= 0.01 * layer.A.grad
            layer.B -= 0.01 * layer.B.grad
    assert orthogonality(model) < before


# The budget


def give_gradients(model: Model, number: int) -> None:
    """What a training leaves: other values after every step, and gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(number)
    for layer in adalora_layers(model).values():
        for tensor in layer.adapter_tensors().values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)


def kept_by_hand(model: Model, schedule: RankSchedule, steps: int) -> dict[str, list[bool]]:
    """The authors' rules, number by number in Python's float64, for a schedule that prunes after every step."""
    layers = adalora_layers(model)
    mean: dict[tuple, float] = {}
    doubt: dict[tuple, float] = {}
    kept = {name: [True] * layer.r for name, layer in layers.items()}
    for number in range(1, steps + 1):
        give_gradients(model, number)
        if number < schedule.end:
            for name, layer in layers.items():
                for letter, tensor in layer.adapter_tensors().items():
                    for place, (w, g) in enumerate(
                        zip(tensor.flatten().tolist(), tensor.grad.flatten().tolist(), strict=True)
                    ):
                        at = (name, letter, place)
                        mean[at] = schedule.beta1 * mean.get(at, 0) + (1 - schedule.beta1) * abs(w * g)
                        off = abs(abs(w * g) - mean[at])
                        doubt[at] = schedule.beta2 * doubt.get(at, 0) + (1 - schedule.beta2) * off
        if schedule.t_init < number <= schedule.end:
            scores = {}
            for name, layer in layers.items():
                n_in, n_out = layer.A.shape[1], layer.B.shape[0]
                s = lambda letter, place, name=name: mean[name, letter, place] * doubt[name, letter, place]  # noqa: E731
                for k in range(layer.r):
                    of_A = sum(s("A", k * n_in + i) for i in range(n_in)) / n_in
                    of_B = sum(s("B", o * layer.r + k) for o in range(n_out)) / n_out
                    scores[name, k] = s("E", k) + of_A + of_B
            left = (schedule.end - number) / (schedule.end - schedule.t_init)
            first, last = sum(layer.r for layer in layers.values()), schedule.target_r * len(layers)
            best = sorted(scores, key=scores.get, reverse=True)[: int(last + (first - last) * left**3)]
            kept = {name: [(name, k) in best for k in range(layer.r)] for name, layer in layers.items()}
        if number > schedule.t_init:
            for name, layer in layers.items():
                layer.E.data[~torch.tensor(kept[name])] = 0
    return kept


SCHEDULE = RankSchedule(target_r=2, n_steps=12, t_init=2, t_final=3, beta1=0.7, beta2=0.6)


def test_the_masks_are_those_of_the_rules_done_by_hand():
    for steps in range(1, 13):
        ours, by_hand = noisy(adapted()), noisy(adapted())
        allocator = RankAllocator(ours, SCHEDULE)
        for number in range(1, steps + 1):
            give_gradients(ours, number)
            allocator.step(number)
        kept = kept_by_hand(by_hand, SCHEDULE, steps)
        for name, layer in adalora_layers(ours).items():
            assert layer.kept.tolist() == kept[name], (steps, name)
            assert torch.equal(layer.E, adalora_layers(by_hand)[name].E), (steps, name)


def test_pruning_waits_for_its_steps_and_ends_at_the_budget():
    model, left = noisy(adapted()), []
    schedule = RankSchedule(target_r=2, n_steps=12, t_init=2, t_final=3, delta_t=2)
    allocator = RankAllocator(model, schedule)
    for number in range(1, 13):
        give_gradients(model, number)
        allocator.step(number)
        left.append(sum(int((layer.E != 0).sum()) for layer in adalora_layers(model).values()))
    # 12 triplets at the start, 6 at the end; at step 4 6 + ⌊6 (5/7)³⌋, at 6 6 + ⌊6 (3/7)³⌋, in between all come back
    assert left == [12, 12, 12, 8, 12, 6, 12, 6, 6, 6, 6, 6]
    assert allocator.sensitivity == {}


def test_of_equal_triplets_exactly_as_many_go_as_the_budget_says():
    model = adapted()
    allocator = RankAllocator(model, RankSchedule(target_r=2, n_steps=1))
    allocator.step(1)
    assert sum(int(layer.kept.sum()) for layer in adalora_layers(model).values()) == 6


def test_a_value_that_comes_back_counts_until_the_choice_is_final():
    assert adalora_layer(nn.Linear(12, 8), r=3, alpha=6).in_use().all()  # though its values are zero
    layer = trained(nn.Linear(12, 8))
    layer.prune(torch.tensor([True, False, True]))
    assert layer.E[1] == 0
    assert layer.in_use().tolist() == [True, False, True]
    layer.E.data[1] = 1
    assert layer.in_use().tolist() == [True, True, True]


def test_a_killed_run_goes_on_with_the_same_bits():
    def steps(model, allocator, numbers):
        for number in numbers:
            give_gradients(model, number)
            allocator.step(number)

    for killed_after in (1, 5, 8, 9, 11):
        whole, killed = noisy(adapted()), noisy(adapted())
        steps(whole, RankAllocator(whole, SCHEDULE), range(1, 13))
        before = RankAllocator(killed, SCHEDULE)
        steps(killed, before, range(1, killed_after + 1))
        numbers, state = copy.deepcopy(killed.state_dict()), copy.deepcopy(before.state_dict())
        resumed = adapted()
        resumed.load_state_dict(numbers)
        after = RankAllocator(resumed, SCHEDULE)
        after.load_state_dict(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in after.state_dict().items())
        steps(resumed, after, range(killed_after + 1, 13))
        for key, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], tensor), (killed_after, key)
        assert str(rank_report(resumed)) == str(rank_report(whole))


def test_a_loaded_state_is_a_copy_of_the_right_layers():
    model, other = noisy(adapted()), noisy(adapted(r=5))
    allocator = RankAllocator(model, SCHEDULE)
    state = allocator.state_dict()
    with pytest.raises(ValueError, match="other layers, or another schedule: kept/first, kept/second"):
        RankAllocator(other, SCHEDULE).load_state_dict(state)
    with pytest.raises(ValueError, match="done, kept/first"):
        RankAllocator(other, SCHEDULE).load_state_dict({})
    again = RankAllocator(noisy(adapted()), SCHEDULE)
    again.load_state_dict(state)
    give_gradients(model, 1)
    allocator.step(1)
    assert not any(again.sensitivity[key].any() for key in again.sensitivity)


def test_the_optimizer_can_call_it_and_a_late_call_is_told():
    model = adapted()
    allocator = RankAllocator(model, RankSchedule(target_r=2, n_steps=6, t_final=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    optimizer.register_step_post_hook(lambda *_: allocator.step(allocator.done + 1))
    x, wanted = torch.randn(20, 12), torch.randn(20, 6)
    losses = []
    for _ in range(6):
        loss = (model(x) - wanted).square().mean() + 0.5 * orthogonality(model)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert allocator.done == 6
    assert sum(rank for rank, _ in rank_report(model).ranks.values()) == 6
    late = RankAllocator(model, SCHEDULE)
    with pytest.raises(ValueError, match=r"first.A has no gradient: call step between optimizer.step\(\)"):
        late.step(1)
    with pytest.raises(ValueError, match="step 2 follows 0"):
        late.step(2)
    assert late.done == 0


class TinyLanguageModel(nn.Module):
    """It remembers one token, and is shaped as `train` wants it: `.model` and `.lm_head`."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        self.lm_head = nn.Linear(16, 12, bias=False)


def test_the_trainer_trains_it_with_the_penalty_and_the_budget():
    model = TinyLanguageModel()
    inject(model, ["model.1", "model.2", "lm_head"], lambda base: adalora_layer(base, r=8, alpha=16))
    batch = collate([mask_prompt([1, 2], [3, 4, 5], eos=0), mask_prompt([6], [7], eos=0)], pad=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    allocator = RankAllocator(model, RankSchedule(target_r=4, n_steps=60, t_init=20, t_final=20))
    optimizer.register_step_post_hook(lambda *_: allocator.step(allocator.done + 1))

    def gradients(model, batch):
        loss = whole_batch(model, batch)
        (0.1 * orthogonality(model)).backward()
        return loss

    before = orthogonality(model).item()
    training = train(model, [batch] * 60, optimizer, gradients=gradients)
    assert training.steps[-1].loss < training.steps[0].loss / 10
    assert orthogonality(model) < before / 2
    assert sum(rank for rank, _ in rank_report(model).ranks.values()) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 0}, "target_r is 0"),
        ({"target_r": 2, "t_init": -1}, "t_init is -1"),
        ({"target_r": 2, "delta_t": 0}, "delta_t 0"),
        ({"target_r": 2, "t_init": 6, "t_final": 4}, "leaves none to prune in"),
        ({"target_r": 2, "beta1": 1.0}, "beta1 is 1.0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RankSchedule(n_steps=10, **settings)


def test_a_budget_above_the_start_is_refused():
    with pytest.raises(ValueError, match="3 layers begin with 12 triplets, 4 a layer"):
        RankAllocator(adapted(), RankSchedule(target_r=5, n_steps=10))


# What comes out


def pruned(**kept: list[bool]) -> Model:
    """A trained model in which these triplets are left."""
    model = noisy(adapted())
    for name, its in kept.items():
        getattr(model, name).prune(torch.tensor(its))
    return model


UNEVEN = {"first": [True, False, True, True], "second": [False] * 4, "third": [False, False, False, True]}


def test_the_report_shows_every_layers_rank():
    report = rank_report(pruned(**UNEVEN))
    assert report.ranks == {"first": (3, 4), "second": (0, 4), "third": (1, 4)}
    assert str(report) == "first  3/4  second  0/4  third  1/4\n4 of 12 triplets are in use, 1.3 a layer"


def test_what_is_left_is_a_plain_lora_with_the_same_output(tmp_path):
    model, x = pruned(**UNEVEN).double().eval(), torch.randn(5, 12, dtype=torch.float64)
    wanted, before = model(x), torch.get_rng_state()
    report = to_lora(model)
    assert torch.equal(torch.get_rng_state(), before)  # the next step's dropout is what it would have been
    assert report.ranks["first"] == (3, 4)
    assert {name: layer.r for name, layer in lora_layers(model).items()} == {"first": 3, "third": 1}
    assert all(type(layer) is LoRALinear for layer in lora_layers(model).values())
    torch.testing.assert_close(model(x), wanted, rtol=1e-13, atol=1e-13)  # the order of r products, in float64
    save_adapter(model.float(), tmp_path)
    here = Model()
    load_adapter(here, tmp_path)
    torch.testing.assert_close(here(x.float()), wanted.float(), rtol=1e-5, atol=1e-5)
    assert not acceptance(tmp_path)["vLLM"].differs  # one factor for all layers


def test_a_layer_of_two_names_stays_one():
    shared, x = Conv1D(12, 12), torch.randn(5, 12)
    model = nn.ModuleDict({"one": shared, "inner": nn.Sequential(shared)})
    inject(model, ["one"], lambda base: trained(base))
    wanted = model["one"](x)
    to_lora(model)
    assert model["one"] is model["inner"][0]
    assert isinstance(model["one"], LoRAConv1D)
    torch.testing.assert_close(model["one"](x), wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_that_trains_beside_them_is_kept():
    model, x = pruned(**UNEVEN), torch.randn(5, 12)
    train_biases(model)
    model.second.base.bias.data.normal_()
    wanted = model(x)
    to_lora(model)
    assert isinstance(model.second, nn.Linear)
    assert model.second.bias.requires_grad
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_become_lora_is_refused():
    empty = pruned(**dict.fromkeys(NAMES, [False] * 4))
    with pytest.raises(ValueError, match="no layer has any rank left"):
        to_lora(empty)
    merged = pruned(**UNEVEN)
    merged.third.merge()
    with pytest.raises(ValueError, match="1 layers are merged, the first is third"):
        to_lora(merged)
    assert isinstance(merged.first, AdaLoRALinear)


def test_removing_gives_the_bases_back():
    plain = Model()
    modules, x = [getattr(plain, name) for name in NAMES], torch.randn(5, 12)
    wanted = plain(x)
    inject(plain, NAMES, lambda base: trained(base))
    assert not torch.equal(plain(x), wanted)
    remove(plain)
    assert [getattr(plain, name) for name in NAMES] == modules
    assert torch.equal(plain(x), wanted)


# Files


@pytest.mark.parametrize("kept", [{}, UNEVEN], ids=["all", "pruned"])
@torch.no_grad()
def test_files_come_back(tmp_path, kept):
    model, x = pruned(**kept), torch.randn(5, 12)
    train_biases(model)
    model.second.base.bias.normal_()
    save_adalora(model, tmp_path, base_sha256="a")
    fresh = Model()
    with pytest.warns(UserWarning, match="another model"):
        report = load_adalora(fresh, tmp_path, base_sha256="b")
    there = noisy(adapted())
    assert load_adalora(there, tmp_path) == report == rank_report(model)
    for read in (fresh, there):
        assert torch.equal(read.second.base.bias, model.second.base.bias)
        torch.testing.assert_close(read(x), model(x), rtol=1e-5, atol=1e-5)  # a bias that trains takes another path
        for name, layer in adalora_layers(read).items():
            chosen = torch.tensor(kept.get(name, [True] * 4))
            assert torch.equal(layer.kept, chosen)
            wanted = getattr(model, name)
            assert torch.equal(layer.A, wanted.A * chosen[:, None])
            assert torch.equal(layer.B, wanted.B * chosen)
            assert torch.equal(layer.E, wanted.E)


@torch.no_grad()
def test_a_file_says_that_its_base_was_in_4_bits(tmp_path):
    model, x = nn.Sequential(NF4Linear(nn.Linear(12, 8))), torch.randn(5, 12)
    again, floats = copy.deepcopy(model), nn.Sequential(nn.Linear(12, 8))
    inject(model, ["0"], lambda base: trained(base))
    save_adalora(model, tmp_path)
    load_adalora(again, tmp_path)
    assert torch.equal(again(x), model(x))
    with pytest.warns(UserWarning, match="nf4"):
        load_adalora(floats, tmp_path)


def test_an_adapter_that_does_not_fit_is_refused_whole(tmp_path):
    save_adalora(pruned(**UNEVEN), tmp_path)
    small = nn.ModuleDict({"first": nn.Linear(12, 11), "second": nn.Embedding(10, 8)})
    with pytest.raises(ValueError, match="does not fit") as error:
        load_adalora(small, tmp_path)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        *(
            f"base_model.model.{layer}.lora_{letter}: the model has no linear layer of that name"
            for layer in ("second", "third")
            for letter in "ABE"
        ),
        "first.lora_B: shape (10, 3), (11, 3) is needed",
    ]
    other = adapted(r=5)
    with pytest.raises(ValueError, match=r"first: \(r, alpha\) is \(4, 6\) in the file, \(5, 6\) in the model"):
        load_adalora(other, tmp_path)
    merged = adapted()
    merged.first.merge()
    with pytest.raises(ValueError, match="1 layers of the model are merged, the first is first"):
        load_adalora(merged, tmp_path)
    fewer = Model()
    inject(fewer, ["first"], lambda base: adalora_layer(base, r=4, alpha=6))
    with pytest.raises(ValueError, match="second: has no adapter in the model"):
        load_adalora(fewer, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "this reader knows 'ADALORA'"),
        ({"use_dora": True}, "AdaLoRA has no magnitudes"),
        ({"init_r": 0}, "init_r = 0: a whole number"),
        ({"init_r": 10**12}, r"first.lora_A: shape \(4, 12\), \(1000000000000, 12\) is needed"),
        ({"lora_alpha": "6"}, "lora_alpha = '6': a number is needed"),
        ({"rank_pattern": {"first.lora_E": [True]}}, "names are needed, each with init_r times true or false"),
        (
            {"rank_pattern": {"nowhere.lora_E": [True] * 4}},
            "'nowhere': the config names it, the file has no such layer",
        ),
        ({"rank_pattern": {"first.lora_E": [False] * 4}}, r"first.lora_A: shape \(4, 12\), \(0, 12\) is needed"),
        ({"lora_bias": True}, "it gives B a bias"),
        ({"something_new": 1}, "not a key this reader knows"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(tmp_path, change, message):
    save_adalora(noisy(adapted()), tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        load_adalora(Model(), tmp_path)


def test_a_layer_of_another_method_is_not_filled(tmp_path):
    save_adalora(adapted(), tmp_path)
    other = Model()
    inject(other, NAMES, lambda base: IA3Linear(base))
    with pytest.raises(ValueError, match=r"first: \(r, alpha\) is \(4, 6\) in the file, IA3Linear in the model"):
        load_adalora(other, tmp_path)


def test_what_pefts_config_has_no_words_for_is_not_written(tmp_path):
    mixed = Model()
    inject(mixed, ["first"], lambda base: adalora_layer(base, r=4, alpha=6))
    inject(mixed, ["second"], lambda base: adalora_layer(base, r=2, alpha=6))
    with pytest.raises(ValueError, match=r"first has \(r, alpha\) = \(4, 6\), second has \(2, 6\)"):
        save_adalora(mixed, tmp_path)
    inject(mixed, ["third"], lambda base: dora_layer(base, r=4, alpha=6))
    with pytest.raises(ValueError, match="third is a DoRALinear"):
        save_adalora(mixed, tmp_path)
    broken = adapted()
    broken.first.E.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_adalora(broken, tmp_path)
    with pytest.raises(ValueError, match="an adapter file of LoRA has no words for it"):
        save_adapter(adapted(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pattern_longer_than_any_config_that_is_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_files, "CONFIG_LIMIT_BYTES", 10_000)  # else it takes 80,000 triplets
    model = nn.Sequential(nn.Linear(900, 900))
    inject(model, ["0"], lambda base: adalora_layer(base, r=900, alpha=1))  # 13 bytes of JSON each
    model[0].prune(torch.arange(900) < 5)
    with pytest.raises(ValueError, match=r"would have 1\d,\d+ bytes, most of them in its rank_pattern; .*to_lora"):
        save_adalora(model, tmp_path)
    assert not list(tmp_path.iterdir())
    to_lora(model)
    save_adapter(model, tmp_path)
    load_adapter(nn.Sequential(nn.Linear(900, 900)), tmp_path)


def test_more_triplets_than_singular_values_are_refused_before_they_are_allocated(tmp_path):
    base = nn.Linear(12, 8)
    assert adalora_layer(base, r=8, alpha=8).r == 8
    base.requires_grad_(True)
    with pytest.raises(ValueError, match="r is 9: the weight has 8 singular values, choose as many or fewer"):
        adalora_layer(base, r=9, alpha=8)
    assert base.weight.requires_grad  # it is as it was

    model = nn.Sequential(nn.Linear(12, 8))
    inject(model, ["0"], lambda base: adalora_layer(base, r=4, alpha=6))
    save_adalora(model, tmp_path)
    edit_config(tmp_path, init_r=140_000, rank_pattern={"0.lora_E": [True] * 4 + [False] * 139_996})
    with pytest.raises(ValueError, match=r"does not fit the model:\n  0: init_r is 140,000, the layer has 8 singular"):
        load_adalora(nn.Sequential(nn.Linear(12, 8)), tmp_path)


def test_whole_modules_travel_with_the_adapter(tmp_path):
    model = Model()
    inject(model, ["first"], lambda base: trained(base))
    train_modules(model, ["third"])
    model.third.weight.data.normal_()
    save_adalora(model, tmp_path)
    here, x = Model(), torch.randn(5, 12)
    load_adalora(here, tmp_path)
    assert torch.equal(here(x), model(x))
    assert adapter_layers(here).keys() == {"first"}
