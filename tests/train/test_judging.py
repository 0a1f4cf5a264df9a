"""What was gained and what forgotten, and when that ends a training."""

import math

import pytest
import torch
from torch import nn

from minilora.train.data import collate, mask_prompt
from minilora.train.evaluate import mean_loss, perplexity
from minilora.train.judging import Judges, Rules, best_of, judge
from minilora.train.listeners import MetricsLog
from minilora.train.loss import loss_of
from minilora.train.trainer import train


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(12, 16), nn.Dropout(0.5))
        self.lm_head = nn.Linear(16, 12, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.model(tokens))


def batch_of(*lengths):
    return collate([mask_prompt([1, 2], [3 + n % 4] * n, eos=0) for n in lengths], pad=0)


def history(*pairs):
    return [{"target": target, "general": general} for target, general in pairs]


def test_the_mean_is_over_all_tokens_not_over_batches():
    model = TinyModel().train()
    batches = [batch_of(1), batch_of(7, 8)]
    together = loss_of(model.eval(), batch_of(1, 7, 8)).item()
    model.train()

    assert mean_loss(model, batches) == pytest.approx(together, rel=1e-6)  # float32, sums in another order
    assert model.training and model.model[1].training


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="cannot measure a loss on no samples"):
        mean_loss(TinyModel(), [])


@pytest.mark.parametrize(
    ("rules", "measured", "verdict"),
    [
        (Rules(patience=2), [(3, 1), (2, 1), (2.5, 1)], None),
        (Rules(patience=2), [(3, 1), (2, 1), (2.5, 1), (2, 1)], "no better target for 2 measurements"),
        (Rules(patience=2), [(3, 1), (2, 1), (2.5, 1), (1, 1)], None),
        (Rules(most_forgotten=0.5), [(3, 1), (2, 1.5)], None),
        (
            Rules(most_forgotten=0.5),
            [(3, 1), (2, 1.6)],
            "forgetting: the loss on plain English rose by 0.60 nats, more",
        ),
        (Rules(), [(1, 1), (9, 9), (9, 9)], None),
        (Rules(patience=1), [], None),
    ],
)
def test_the_rules(rules, measured, verdict):
    found = rules.verdict(history(*measured))

    assert found is None if verdict is None else found.startswith(verdict)


@pytest.mark.parametrize("rule", [{"every": 0}, {"patience": 0}, {"most_forgotten": -0.1}])
def test_a_rule_that_is_not_positive_is_refused(rule):
    with pytest.raises(ValueError, match=r"is (0|-0\.1): choose a number above 0"):
        Rules(**rule)


def test_a_training_is_measured_and_ended(tmp_path):
    model, batch, general, said = TinyModel(), batch_of(3, 4), [5, 6, 7, 8] * 200, []
    before = mean_loss(model, [batch]), math.log(perplexity(model, general))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    listener = judge(model, Judges([batch], general, Rules(every=3, most_forgotten=0.3)), log, said.append)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    training = train(model, [batch] * 50, optimizer, listeners=[listener])

    assert training.stopped_by.startswith("forgetting")
    assert [line["step"] for line in log.measured] == list(range(0, len(training.steps) + 1, 3))
    assert (log.measured[0]["target"], log.measured[0]["general"]) == before
    assert log.measured[-1]["general"] - before[1] > 0.3 >= log.measured[-2]["general"] - before[1]
    assert said[0] == "measuring the model as it is before training …"
    assert said[1].startswith(f"step 0: loss on held-out samples {before[0]:.3f}; gained 0.000, forgotten 0.000")


def test_the_best_step_is_kept_and_not_the_one_that_ended_it(tmp_path):
    model, batch, general, kept = TinyModel(), batch_of(3, 4), [5, 6, 7, 8] * 200, []
    log = MetricsLog(tmp_path / "metrics.jsonl")
    listener = judge(model, Judges([batch], general, Rules(3, None, 0.3), kept.append), log, lambda text: None)
    training = train(model, [batch] * 50, torch.optim.AdamW(model.parameters(), lr=0.1), listeners=[listener])

    assert training.stopped_by.startswith("forgetting")
    assert kept == [line["step"] for line in log.measured[1:-1]]  # each was better than the one before; the last forgot
    measured = [{"step": n, "target": t, "general": g} for n, (t, g) in enumerate([(3, 1), (1, 1.5), (2, 1), (0, 2)])]
    assert [best_of(measured, most)["step"] for most in (None, 0.6, 0.2)] == [3, 1, 2]


def test_a_training_that_goes_on_is_compared_with_its_very_beginning(tmp_path):
    model, batch = TinyModel(), batch_of(3)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 0, "target": 9.0, "general": -9.0})
    said = []
    judge(model, Judges([batch], [1, 2] * 300, Rules()), log, said.append)

    assert said == [] and len(log.measured) == 1
