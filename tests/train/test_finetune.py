"""fine_tune does what its recipe says: each number is seen in what was trained, not only handed on."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from minilora.qlora import PagedAdamW
from minilora.torch_lora import LoRALinear, inject
from minilora.torch_lora.inject import lora_layers
from minilora.train import finetune
from minilora.train.checkpoint import Saving
from minilora.train.data import collate, mask_prompt
from minilora.train.finetune import Recipe, fine_tune
from minilora.train.judging import Judges, Rules
from minilora.train.trainer import train

SAMPLES = [mask_prompt([1, 2 + n % 3], [3 + n % 4] * (1 + n % 5), eos=0, name=f"line {n}") for n in range(12)]
RECIPE = Recipe(lr=0.05, batch_size=4, epochs=2)


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 16))
        self.lm_head = nn.Linear(16, 12, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.model(tokens))


def new_model():
    torch.manual_seed(0)
    model = TinyModel()
    inject(model, ["1"], lambda base: LoRALinear(base, r=2, alpha=4))
    return model


def watched(monkeypatch):
    """The batches, rates and optimizers that train is given by fine_tune."""
    seen = {}

    def spy(model, batches, optimizer, schedule, max_grad_norm, *rest, **more):
        seen.update(batches=batches, optimizer=optimizer, max_grad_norm=max_grad_norm)
        return train(model, batches, optimizer, schedule, max_grad_norm, *rest, **more)

    monkeypatch.setattr(finetune, "train", spy)
    return seen


def run(recipe, **settings):
    model = new_model()
    return model, fine_tune(model, SAMPLES, recipe, pad=0, **settings)


def test_the_rate_rises_over_the_warmup_and_falls_along_the_shape():
    _, straight = run(replace(RECIPE, warmup=0.5))
    _, at_once = run(replace(RECIPE, warmup=0.0, shape="constant"))

    rates = [step.lr / 0.05 for step in straight.steps]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3])
    assert [step.lr for step in at_once.steps] == [0.05] * 6


def test_every_epoch_has_all_samples_in_an_order_of_its_own(monkeypatch):
    seen = watched(monkeypatch)
    orders = []
    for seed in (0, 0, 7):
        run(replace(RECIPE, seed=seed))
        orders.append([batch.tokens.tolist() for batch in seen["batches"]])

    first, second = orders[0][:3], orders[0][3:]
    assert sum(len(batch) for batch in first) == sum(len(batch) for batch in second) == 12
    assert first != second
    assert orders[0] == orders[1] != orders[2]


def test_decay_and_clipping_reach_the_weights():
    plain, _ = run(RECIPE)
    for given in ({"weight_decay": 0.5}, {"max_grad_norm": 1e-4}, {"state_bits": 8}):
        changed, training = run(replace(RECIPE, **given))
        assert len(training.steps) == 6
        A, its = (lora_layers(model)["model.1"].A for model in (plain, changed))
        assert torch.equal(A, its) == ("state_bits" in given)  # a small tensor keeps 32 bits
    (shrunk, _), (kept, _) = run(replace(RECIPE, weight_decay=5.0)), run(replace(RECIPE, weight_decay=0.0))
    assert lora_layers(shrunk)["model.1"].A.norm() < lora_layers(kept)["model.1"].A.norm()


def test_the_optimizer_is_the_recipes(monkeypatch):
    seen = watched(monkeypatch)
    run(replace(RECIPE, state_bits=8, weight_decay=0.25, max_grad_norm=0.5))

    (group,) = seen["optimizer"].param_groups
    assert isinstance(seen["optimizer"], PagedAdamW)
    assert (group["lr"], group["weight_decay"], seen["optimizer"].state_bits) == (0.05, 0.25, 8)
    assert seen["max_grad_norm"] == 0.5


def test_packed_rows_hold_several_samples(monkeypatch):
    seen = watched(monkeypatch)
    monkeypatch.setattr(TinyModel, "forward", None)
    with pytest.raises(TypeError):  # a model of two layers knows no masks; what it was given is looked at
        run(replace(RECIPE, pack_tokens=16, batch_size=2))

    assert all(batch.segments is not None and batch.tokens.shape[1] <= 16 for batch in seen["batches"])
    assert sum(int((batch.positions == 0).sum()) for batch in seen["batches"]) >= 2 * 12


def test_a_batch_in_parts_gives_the_same_weights():
    (whole, _), (parts, _) = run(RECIPE), run(replace(RECIPE, n_parts=3))
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # float32, six steps, sums in another order


def test_a_training_that_its_judges_ended_does_not_go_on(tmp_path):
    held_out = [collate(SAMPLES[:3], pad=0)]
    saving = Saving(tmp_path / "checkpoint.safetensors", {}, every=1)
    judges = Judges(held_out, list(range(12)) * 60, Rules(every=1, patience=1))
    recipe = replace(RECIPE, lr=1e-30)  # nothing gets better
    _, first = run(recipe, saving=saving, judged_by=judges)
    _, second = run(recipe, saving=saving, judged_by=judges)

    assert first.stopped_by == second.stopped_by == "no better target for 1 measurement"
    assert len(first.steps) == 1 and second.steps == []
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("target" in line for line in log) == 2


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0: choose a number above 0, such as 2e-4"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batch_size": 0, "epochs": 0}, "batch_size is 0: choose 1 or more; epochs is 0: choose 1 or more"),
        ({"n_parts": 5}, "n_parts is 5: choose 1 to batch_size"),
        ({"state_bits": 16}, "state_bits is 16: choose 8 or 32"),
        ({"shape": "square"}, "shape is square: choose linear, cosine, constant"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"warmup": 1.0}, "warmup is 1.0"),
    ],
)
def test_impossible_numbers_are_refused_all_at_once(numbers, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **numbers)
