"""A training that was stopped, or killed at any moment, goes on to the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_run import write_base, write_data

from minilora import cli
from minilora.train import command, trainer
from minilora.train.checkpoint import read_checkpoint

OPTIONS = "--batch 2 --accumulate 2 --epochs 2 -r 4 --dropout 0.2 --lr 0.01 --dtype fp32 --seed 3"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    base, data = write_base(folder / "base"), write_data(folder / "data.jsonl", 20)
    held_out = write_data(folder / "held_out.jsonl", 3)
    files = ["--base", str(base), "--data", str(data), "--eval-data", str(held_out), "--eval-every", "4"]
    return ["train", *files, *OPTIONS.split()]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """What a run leaves that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main([*words, "--out", str(out)]) == 0
    return left_by(out)


def left_by(out):
    """The adapter's bytes, all numbers of the checkpoint but torch's random state (it has unused fields), the log."""
    saved = read_checkpoint(out / "checkpoint.safetensors")
    numbers = {name: tensor.tolist() for name, tensor in saved.tensors.items() if not name.startswith("random/")}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return (out / "adapter_model.safetensors").read_bytes(), (saved.step, saved.run, saved.numbers, numbers), lines


def test_a_run_that_ctrl_c_stopped_goes_on_to_the_same_bytes(words, whole, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", trainer.check_finite

    def press_ctrl_c(what, value, number, where):
        if number == 7 and what == "loss":
            signal.raise_signal(signal.SIGINT)
        real(what, value, number, where)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(trainer, "check_finite", press_ctrl_c)
        assert cli.main([*words, "--out", str(out)]) == 130
        monkeypatch.undo()
    finally:
        signal.signal(signal.SIGINT, before)
    told = capsys.readouterr().out
    assert "stopped by Ctrl-C after 7 of 20 steps" in told and f"minilora resume {out}" in told
    assert (out / "adapter_model.safetensors").exists()
    torch.manual_seed(99)
    moved = out.rename(tmp_path / "moved")

    assert cli.main(["resume", str(moved)]) == 0
    assert left_by(moved) == whole


def test_a_finished_run_that_is_resumed_stays_as_it_is(words, whole, tmp_path):
    out = tmp_path / "out"
    assert cli.main([*words, "--out", str(out)]) == 0
    assert cli.main(["resume", str(out)]) == 0

    assert left_by(out) == whole


def test_options_of_nothing_are_options_too(words, tmp_path):
    out, none = tmp_path / "out", ["--warmup", "0", "--dropout", "0", "--seed", "0", "--weight-decay", "0"]
    assert cli.main([*words, "--out", str(out), *none]) == 0
    given = {word.partition("=")[0]: word.partition("=")[2] for word in command.words_of(out)}
    assert {given[f"--{name}"] for name in ("warmup", "dropout", "weight-decay")} == {"0.0"}
    assert given["--seed"] == "0" and "--rslora" not in given and "--pack" not in given
    adapter = (out / "adapter_model.safetensors").read_bytes()
    assert cli.main(["resume", str(out)]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == adapter


def test_what_a_killed_run_left_half_written_is_in_nobodys_way(words, whole, tmp_path):
    out = tmp_path / "out"
    (out / "best").mkdir(parents=True)
    for place in (".run.json-0123abcd", ".metrics.jsonl-01234567", "best/.adapter_config.json-0123abcd"):
        (out / place).write_bytes(b"half")
    (out / "best/adapter_config.json").write_bytes(b"of a run before")
    (out / "run.json").write_bytes(b"of a run before")
    assert cli.main([*words, "--out", str(out), "--eval-every", "100", "--epochs", "1"]) == 0

    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert json.loads((out / "best/adapter_config.json").read_text())["r"] == 4


def test_a_folder_with_a_training_is_not_trained_over(words, tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"of another")

    assert cli.main([*words, "--out", str(tmp_path)]) == 2
    told = f"holds a training: if it was stopped, go on with `minilora resume {tmp_path}`; or choose another --out"
    assert told in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"of another"


def test_other_data_under_the_same_name_is_another_run(words, tmp_path, capsys):
    data, out = write_data(tmp_path / "data.jsonl", 20), tmp_path / "out"
    assert cli.main([*words, "--out", str(out), "--data", str(data)]) == 0
    adapter = (out / "adapter_model.safetensors").read_bytes()
    write_data(data, 19)

    assert cli.main(["resume", str(out)]) == 2
    assert "the checkpoint is of another run:\n  the contents of --data have changed since" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == adapter


def test_a_folder_without_a_training_cannot_be_resumed(tmp_path, capsys):
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert f"{tmp_path} has no run.json: it holds no training to go on with" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*words, "--out", str(out)]) == 0
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    assert cli.main(["resume", str(out)]) == 2
    assert "checkpoint.safetensors is no whole checkpoint" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_ten_times_at_random_moments_ends_with_the_same_bytes(words, whole, tmp_path, seed):
    out, moments = tmp_path / "out", random.Random(seed)
    words = [*words, "--out", str(out), "--save-every", "1"]
    steps_at = []
    for kill in range(10):
        started = (out / "checkpoint.safetensors").exists()
        process = start(["resume", str(out)] if started else words)
        step = 4 * kill // 3 + moments.randrange(2)  # of 20 steps: the last kill comes well before the end
        while steps_made(out) < step + 1 and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.06))  # a step with its saving
        process.kill()
        assert process.wait() == -signal.SIGKILL
        steps_at.append(steps_made(out))
    print(f"killed when the log had {steps_at} steps")
    assert start(["resume", str(out)]).wait() == 0

    assert left_by(out) == whole
    assert not list(out.glob(".*")), "what a killed process left under a temporary name"


def start(words):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-m", "minilora.cli", *words], env=environment, stderr=subprocess.DEVNULL)


def steps_made(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0
