"""The loop: what it computes, what it tells, and how it stops."""

import signal
import threading

import pytest
import torch
from torch import nn

from minilora.train.data import collate, mask_prompt
from minilora.train.listeners import progress_bar
from minilora.train.loss import loss_of
from minilora.train.trainer import CTRL_C, Step, Training, in_parts, train, warmup_then_decay


class TinyModel(nn.Module):
    """A language model with a memory of one token, shaped as `train` wants it: `.model` and `.lm_head`."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(12, 16), nn.Dropout(0.5))
        self.lm_head = nn.Linear(16, 12, bias=False)


@pytest.fixture
def batch():
    return collate([mask_prompt([1, 2], [3, 4, 5], eos=0), mask_prompt([6], [7], eos=0)], pad=0)


def test_the_loop_is_adamw_with_clipped_gradients(batch):
    torch.manual_seed(0)
    ours, reference = TinyModel().eval(), TinyModel().eval()
    reference.load_state_dict(ours.state_dict())
    ours.model[1].p = reference.model[1].p = 0.0
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1)
    for factor in (0.5, 1.0, 0.75):
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        loss_of(reference, batch).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()

    factors = {1: 0.5, 2: 1.0, 3: 0.75}
    train(ours, [batch] * 3, torch.optim.AdamW(ours.parameters(), lr=0.1), factors.__getitem__, max_grad_norm=0.3)

    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_training_learns(batch):
    model = TinyModel()
    training = train(model, [batch] * 60, torch.optim.AdamW(model.parameters(), lr=0.05))

    assert training.steps[-1].loss < training.steps[0].loss / 10


def test_listeners_hear_of_every_step(batch):
    model, heard = TinyModel(), []
    schedule = warmup_then_decay(n_steps=5, n_warmup=1)
    train(model, [batch] * 5, torch.optim.AdamW(model.parameters(), lr=0.2), schedule, listeners=[heard.append])

    assert [step.number for step in heard] == [1, 2, 3, 4, 5]
    assert [step.lr for step in heard] == pytest.approx([0.1, 0.2, 0.15, 0.1, 0.05])
    assert {step.n_tokens for step in heard} == {batch.tokens.numel()}
    assert {step.n_steps for step in heard} == {5}


def test_every_group_keeps_its_own_rate(batch):
    model = TinyModel()
    groups = [{"params": model.lm_head.parameters(), "lr": 0.1}, {"params": model.model.parameters(), "lr": 0.4}]
    optimizer = torch.optim.AdamW(groups)
    rates = []
    train(model, [batch], optimizer, lambda number: 0.5, listeners=[lambda step: rates.extend(g["lr"] for g in groups)])

    assert rates == [0.05, 0.2]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]  # and gets it back afterwards


def test_the_progress_bar_shows_loss_speed_and_rate(batch, capsys):
    with progress_bar(2) as listen:
        listen(Step(number=1, n_steps=2, loss=1.25, grad_norm=0.1, lr=1e-3, n_tokens=512, seconds=0.5))

    assert "loss 1.250, 1,024 tokens/s, lr 1.0e-03" in capsys.readouterr().err


@pytest.fixture
def ctrl_c_works():
    """A process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_works")
def test_ctrl_c_finishes_the_step_and_returns_what_was_trained(batch):
    model = TinyModel()

    def press_ctrl_c_at_step_three(step):
        if step.number == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    optimizer = torch.optim.AdamW(model.parameters())
    training = train(model, [batch] * 10, optimizer, listeners=[press_ctrl_c_at_step_three])

    assert len(training.steps) == 3
    assert str(training) == "stopped by Ctrl-C after 3 of 10 steps; the model keeps what it has learnt so far"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("ctrl_c_works")
def test_ctrl_c_in_the_middle_of_a_step_does_not_tear_it(batch):
    ours, reference = TinyModel(), TinyModel()
    reference.load_state_dict(ours.state_dict())
    ours.model[1].p = reference.model[1].p = 0.0
    ours.model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    assert len(train(ours, [batch] * 10, torch.optim.AdamW(ours.parameters())).steps) == 1

    train(reference, [batch], torch.optim.AdamW(reference.parameters()))
    assert torch.equal(ours.lm_head.weight, reference.lm_head.weight)


@pytest.mark.usefixtures("ctrl_c_works")
def test_a_second_ctrl_c_breaks_off(batch):
    model = TinyModel()

    def press_twice(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model, [batch] * 10, torch.optim.AdamW(model.parameters()), listeners=[press_twice])


def test_where_ctrl_c_is_ignored_it_stays_ignored(batch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = TinyModel()
        listeners = [lambda step: signal.raise_signal(signal.SIGINT)]
        training = train(model, [batch] * 3, torch.optim.AdamW(model.parameters()), listeners=listeners)
        assert len(training.steps) == 3 and not training.interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_may_train(batch):
    trainings = []
    model = TinyModel()

    def work():
        trainings.append(train(model, [batch], torch.optim.AdamW(model.parameters())))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert len(trainings[0].steps) == 1


def test_a_nan_never_reaches_the_weights(batch):
    model = TinyModel()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    before = model.model[0].weight.clone()

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    with pytest.raises(
        FloatingPointError,
        match=r"the loss is nan at step 1, first in the weight lm_head.weight; .*lower the learning rate",
    ):
        train(model, [batch], optimizer, lambda number: 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(model.model[0].weight, before)


def test_dropout_is_on_while_training_and_back_afterwards(batch):
    model, modes = TinyModel().eval(), []
    train(model, [batch], torch.optim.AdamW(model.parameters()), listeners=[lambda step: modes.append(model.training)])

    assert modes == [True] and not model.training


def test_a_frozen_weight_stays(batch):
    model = TinyModel()
    model.model.requires_grad_(False)
    before = model.model[0].weight.clone()
    train(model, [batch] * 3, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))

    assert torch.equal(model.model[0].weight, before)


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"warm up for 10 of 10 steps: choose n_warmup from 0 to 9"):
        warmup_then_decay(n_steps=10, n_warmup=10)


def test_the_schedule_never_rests_at_zero():
    schedule = warmup_then_decay(n_steps=100, n_warmup=10)

    assert all(0 < schedule(number) <= 1 for number in range(1, 101))
    assert max(range(1, 101), key=schedule) == 11


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),  # cos of π/4, π/2, 3π/4
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ],
)
def test_a_schedule_has_its_shape(shape, factors):
    schedule = warmup_then_decay(6, 2, shape)

    assert [schedule(number) for number in range(1, 7)] == pytest.approx(factors)


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no schedule has the shape 'square': choose linear, cosine, constant"):
        warmup_then_decay(6, 2, "square")


def test_all_processes_stop_where_one_does(batch):
    asked = []

    def anywhere(flag):
        asked.append(flag)
        return len(asked) == 2  # another one was told to

    model = TinyModel()
    training = train(model, [batch] * 5, torch.optim.SGD(model.parameters(), lr=0.1), anywhere=anywhere)

    assert asked == [False, False] and len(training.steps) == 2
    assert training.stopped_by == CTRL_C


def test_the_norms_of_all_gradients_are_for_listeners_and_not_kept(batch):
    model, heard = TinyModel(), []
    training = train(model, [batch], torch.optim.SGD(model.parameters(), lr=0.1), listeners=[heard.append])

    assert heard[0].grad_norms and not training.steps[0].grad_norms


def test_a_finished_training_says_what_it_took():
    steps = [Step(n, 2, loss=1.0, grad_norm=1.0, lr=0.1, n_tokens=8, seconds=1.5) for n in (1, 2)]

    assert str(Training(steps)) == "2 steps in 3 s"


def test_no_batches_is_no_steps():
    model = TinyModel()

    assert train(model, [], torch.optim.AdamW(model.parameters())).steps == []


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(batch, bad):
    model = TinyModel()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.lm_head.weight.register_hook(lambda grad: torch.full_like(grad, bad))
    with pytest.raises(
        FloatingPointError,
        match=r"norm of the gradients is .* at step 1, first in the gradient of lm_head.weight; the weig",
    ):
        train(model, [batch], torch.optim.AdamW(model.parameters()))

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_infinite_loss_never_reaches_the_weights(batch):
    model = TinyModel()
    torch.nn.init.constant_(model.lm_head.weight, float("inf"))
    with pytest.raises(FloatingPointError, match=r"the loss is (inf|nan) at step 1"):
        train(model, [batch], torch.optim.AdamW(model.parameters()))


def test_every_module_gets_its_own_mode_back(batch):
    model = TinyModel().train()
    model.model[1].eval()
    train(model, [batch], torch.optim.AdamW(model.parameters()))

    assert model.training
    assert not model.model[1].training


@pytest.mark.parametrize("n_parts", [2, 3, 9])
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(n_parts):
    """Also where parts differ in labels: a mean of means would be another number (transformers #34191)."""
    samples = [mask_prompt([1, 2], [3] * n, eos=0) for n in (1, 2, 5, 9, 1)]
    batch, model = collate(samples, pad=0), TinyModel().double().eval()
    losses, gradients = [], []
    for way in (in_parts(1), in_parts(n_parts)):
        losses.append(way(model, batch))
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()

    assert losses[1] == pytest.approx(losses[0], abs=1e-14)  # float64, sums in another order
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)


def test_no_parts_are_refused():
    with pytest.raises(ValueError, match="cannot take a batch in 0 parts: choose 1 or more"):
        in_parts(0)


def test_a_listener_may_give_a_reason_to_stop(batch):
    model = TinyModel()
    reasons = {3: "it is good enough"}
    optimizer = torch.optim.AdamW(model.parameters())
    training = train(model, [batch] * 9, optimizer, listeners=[lambda step: reasons.get(step.number)])

    assert str(training) == "stopped by it is good enough after 3 of 9 steps; the model keeps what it has learnt so far"
    assert training.interrupted and len(training.steps) == 3


def test_steps_that_were_made_are_passed_over(batch):
    model, heard = TinyModel(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    training = train(model, [batch] * 5, optimizer, lambda number: number / 10, listeners=[heard.append], done=3)

    assert [(step.number, step.lr) for step in heard] == [(4, 0.4), (5, 0.5)]
    assert not training.interrupted


def test_a_step_tells_the_norm_of_each_gradient(batch):
    model, heard = TinyModel(), []
    train(model, [batch], torch.optim.SGD(model.parameters(), lr=0.1), listeners=[heard.append])
    (step,) = heard

    assert list(step.grad_norms) == ["model.0.weight", "lm_head.weight"]
    assert sum(norm**2 for norm in step.grad_norms.values()) == pytest.approx(step.grad_norm**2, rel=1e-6)


def test_where_a_bad_number_arises_is_told(batch):
    model = TinyModel()
    model.model.insert(1, nn.Identity())
    model.model[1].register_forward_hook(lambda module, given, made: made / 0)
    with pytest.raises(
        FloatingPointError, match=r"step 1, first in what model\.1 makes of finite numbers; the weights"
    ):
        train(model, [batch], torch.optim.AdamW(model.parameters()))

    assert all(not module._forward_hooks for module in model.modules() if module is not model.model[1])
