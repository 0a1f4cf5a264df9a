"""What listens to a training: the log, and what goes wrong in silence."""

from torch import nn

from minilora.torch_lora import LoRALinear, inject
from minilora.train.health import idle_adapters
from minilora.train.listeners import MetricsLog, health_check, norms_by_layer, read_metrics
from minilora.train.trainer import Step


def step(number, loss=1.0, **norms):
    return Step(number, 100, loss, grad_norm=2.0, lr=0.1, n_tokens=8, seconds=0.5, grad_norms=norms)


def test_the_log_has_a_line_for_every_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log(step(1, loss=3.0))
    log.write({"step": 1, "target": 2.5})

    steps, measured = read_metrics(tmp_path / "metrics.jsonl")
    assert steps == {
        "step": 1, "loss": 3.0, "grad_norm": 2.0, "lr": 0.1, "tokens": 8, "seconds": 0.5, "grad_norms": {},
    }  # fmt: skip
    assert measured == {"step": 1, "target": 2.5} and log.measured == [measured]


def test_a_log_that_goes_on_forgets_what_will_be_made_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(path, done=2)
    log.write({"step": 3, "loss": 1.0})

    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'


def test_a_training_from_the_start_begins_a_new_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path)

    assert path.read_text() == ""


def test_norms_are_joined_by_layer():
    norms = {"model.layers.0.a.A": 3.0, "model.layers.0.b.B": 4.0, "model.layers.10.a.A": 1.0, "lm_head.A": 2.0}

    assert norms_by_layer(norms) == {"model.layers.0": 5.0, "model.layers.10": 1.0, "lm_head": 2.0}


def test_an_adapter_that_does_not_move_is_told_after_the_first_step():
    model, said = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), []
    inject(model, ["0", "1"], lambda base: LoRALinear(base, r=2, alpha=2))
    nn.init.ones_(model[1].B)
    listen = health_check(model, said.append)
    listen(step(1))
    listen(step(2))

    assert idle_adapters(model) == ["0"]
    (text,) = said
    assert text.startswith("after step 1 B is still zero in 1 adapter layers, such as 0: no gradient reaches them")


def test_a_loss_that_jumps_is_told():
    said = []
    listen = health_check(nn.Linear(1, 1), said.append)
    for number in range(1, 21):
        listen(step(number, loss=1.0))
    for number, loss in enumerate([1.9, 2.1, 2.2, 1.0], start=21):
        listen(step(number, loss=loss))

    (text,) = said
    assert text.startswith("step 22: the loss is 2.100, where 1.000 was usual: look at its batch")


def test_a_loss_that_climbs_from_the_first_steps_on_is_told_once():
    said = []
    listen = health_check(nn.Linear(1, 1), said.append)
    for number, loss in enumerate([3.0, 2.9, 3.1, 5.0, 7.0, 9.0], start=1):
        listen(step(number, loss=loss))

    (text,) = said
    assert text.startswith("step 5: the loss is 7.000, where 3.050 was usual")


def test_noise_of_a_small_loss_is_no_jump():
    said = []
    listen = health_check(nn.Linear(1, 1), said.append)
    for number in range(1, 41):
        listen(step(number, loss=0.05 if number % 7 else 0.2))

    assert said == []
