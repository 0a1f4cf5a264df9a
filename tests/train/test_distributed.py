"""Two processes train as one does: the same losses, the same adapters; little is sent, and all of them end well.

Processes talk by gloo, on a CPU. Nothing here has run on several GPUs.
"""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_base, write_data
from two_processes import CASES, METHODS, N_STEPS, SOME, WAYS, batches, name_of, tiny_model, trained

import minilora
from minilora import cli
from minilora.train.checkpoint import read_checkpoint
from minilora.train.data import Batch, collate, mask_prompt
from minilora.train.distributed import process_group, shares

PROGRAM = Path(__file__).with_name("two_processes.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(minilora.__file__).parents[1])}
CLI_OPTIONS = "--batch 4 --epochs 4 -r 4 --lr 0.01 --dtype fp32 --save-every 1"


def torchrun(*words, **settings):
    """Two processes of torchrun: `torchrun --nproc-per-node 2 WORDS`."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*start, *words], env=ENVIRONMENT, text=True, **settings)


def finish(process):
    """What it said on stdout; it must end well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module", params=["some", pytest.param("everything", marks=pytest.mark.long)])
def runs(request, tmp_path_factory):
    """Of each case, what both processes found, and their adapters."""
    folder = tmp_path_factory.mktemp("runs")
    finish(torchrun(str(PROGRAM), request.param, str(folder), stderr=subprocess.PIPE))
    return {
        case: [
            (json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))
            for path in (folder / f"{name_of(*case)}-{rank}.json" for rank in range(2))
        ]
        for case in (CASES if request.param == "everything" else SOME)
    } | {"folder": folder}


@pytest.fixture(scope="module")
def alone():
    """What one process makes of the same batches, with each method."""
    return {method: trained(tiny_model(method)) for method in METHODS}


def cases(runs):
    return {case: found for case, found in runs.items() if case != "folder"}


def test_the_losses_of_twenty_steps_are_those_of_one_process(runs, alone):
    """Largest difference seen: 3e-6, of losses from 17 to 9: two units in a float32's last place."""
    for (method, *_), found in cases(runs).items():
        losses, norms, _ = alone[method]
        for told, _ in found:
            assert len(told["losses"]) == N_STEPS
            assert told["losses"] == pytest.approx(losses, rel=0, abs=1e-5)
            assert told["norms"] == pytest.approx(norms, rel=1e-4)
    assert alone["lora"][0][-1] < 0.6 * alone["lora"][0][0], "a training that stands still would compare nothing"


def test_the_adapters_end_where_those_of_one_process_end(runs, alone):
    """AdamW makes a step of lr of a gradient that is nothing but rounding: so the distance of all together counts."""
    for (method, *_), found in cases(runs).items():
        start = {name: p.detach() for name, p in tiny_model(method).named_parameters() if p.requires_grad}
        for _, adapters in found:
            assert adapters.keys() == start.keys()
            assert distance(adapters, alone[method][2]) < 1e-3 * distance(adapters, start)


def distance(some, others):
    return math.sqrt(sum(float((some[name] - tensor).square().sum()) for name, tensor in others.items()))


def test_both_processes_hold_the_same_bits(runs):
    for first, second in cases(runs).values():
        assert first[0]["losses"] == second[0]["losses"]
        assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())


def test_only_the_gradients_of_adapters_are_sent_and_once_a_batch(runs):
    for (_, way, *_), found in cases(runs).items():
        for told, adapters in found:
            assert told["sent_bytes"] == sum(tensor.nbytes for tensor in adapters.values())
            assert told["collectives"] == {"ddp": ["allreduce_"], "fsdp": ["_allgather_base_", "allreduce_"]}[way]


def test_a_process_keeps_half_of_what_is_sharded(runs):
    """4-bit units stay whole, and of 97 rows one process keeps 49: of these small weights that is up to 3 %."""
    for (_, way, *_), found in cases(runs).items():
        for told, _ in found:
            share = told["kept_bytes"] / told["whole_bytes"]
            assert 0.49 < share < 0.53 if way == "fsdp" else share == 1


@pytest.mark.long
@pytest.mark.parametrize("runs", ["everything"], indirect=True)
def test_a_loss_that_is_not_finite_is_traced_to_its_place(runs):
    for way in WAYS:
        for rank in range(2):
            weight, overflow = json.loads((runs["folder"] / f"bad-{way}-{rank}.json").read_text())
            assert "first in the weight model.layers.1.mlp.up_proj.B; the weights are those of step 0" in weight
            assert "first in what model.layers.1.mlp.down_proj makes of finite numbers" in overflow


@pytest.mark.parametrize("n_parts", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_row_of_a_batch_is_taken_once(world, n_parts):
    for batch in batches()[:5]:
        taken = [shares(batch, rank, world, n_parts) for rank in range(world)]
        rows = [row for parts in taken for part, weight in parts if weight for row in part.labels.tolist()]

        assert [len(parts) for parts in taken] == [n_parts] * world
        assert sum(weight for parts in taken for _, weight in parts) == pytest.approx(1)
        assert sorted(map(learnt, rows)) == sorted(map(learnt, batch.labels.tolist()))


def learnt(row):
    return [label for label in row if label != -100]


def test_a_share_is_every_other_row_and_counts_by_its_labels():
    answers = [[5], [5, 6, 7], [5, 6], [5, 6, 7, 8], [5, 6, 7]]  # and an eos each
    batch = collate([mask_prompt([1, n], answer, eos=0) for n, answer in enumerate(answers, start=1)], pad=0)

    ((first, first_weight),) = shares(batch, 0, 2, 1)
    ((second, second_weight),) = shares(batch, 1, 2, 1)

    assert first.tokens[:, 1].tolist() == [1, 3, 5]
    assert second.tokens[:, 1].tolist() == [2, 4]
    assert (first_weight, second_weight) == (9 / 18, 9 / 18)
    assert (first.tokens.shape[1], second.tokens.shape[1]) == (6, 7)  # no padding but their own


def test_packed_rows_keep_their_segments():
    batch = Batch(torch.ones(2, 4).long(), torch.ones(2, 4).long(), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]))

    ((part, weight),) = shares(batch, 1, 2, 1)

    assert part.segments is not None and part.segments.tolist() == [[0, 1, 1, 1]]
    assert weight == 0.5


def test_a_process_that_torchrun_did_not_start_is_told_how(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    with pytest.raises(ValueError, match="start it by `torchrun --nproc-per-node 2"), process_group():
        pass


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_end_well_twenty_times_of_twenty(way, tmp_path):
    for _ in range(20):
        processes = [start_one(rank, port, way, tmp_path) for port in [free_port()] for rank in range(2)]
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert (process.returncode, err) == (0, "")


def start_one(rank, port, what, folder):
    """A process as torchrun would start it, without torchrun, which would import torch once more."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, str(PROGRAM), what, str(folder)]
    return subprocess.Popen(words, env=ENVIRONMENT | place, text=True, stderr=subprocess.PIPE)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    base, data = write_base(folder / "base"), write_data(folder / "data.jsonl", 20)
    return ["train", "--base", str(base), "--data", str(data), *CLI_OPTIONS.split()]


def losses_in(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["--parallel", "fsdp", "--method", "qlora", "--accumulate", "2"]])
def test_minilora_train_under_torchrun_learns_what_it_learns_alone(options, words, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert cli.main([*words, *options[2:], "--out", str(alone)]) == 0

    said = finish(torchrun("-m", "minilora.cli", *words, *options, "--out", str(together), stdout=subprocess.PIPE))

    assert losses_in(together) == pytest.approx(losses_in(alone), rel=0, abs=1e-5)
    assert said.count("adapter  ") == said.count("20 steps in ") == 1, "the first process alone tells"
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (alone, together))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_two_processes_that_is_killed_goes_on_to_the_same_bytes(way, words, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(torchrun("-m", "minilora.cli", *words, "--parallel", way, "--out", str(whole), stdout=subprocess.PIPE))
    run = torchrun(
        "-m", "minilora.cli", *words, "--parallel", way, "--out", str(killed),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    step = random.Random(way).randrange(3, 15)
    while not (killed / "metrics.jsonl").exists() or len(losses_in(killed)) < step:
        assert run.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[step % 2]), signal.SIGKILL)  # torchrun ends the other one, and itself
    assert run.wait() != 0
    assert len(losses_in(killed)) < 20

    finish(torchrun("-m", "minilora.cli", "resume", str(killed), stdout=subprocess.PIPE))

    assert losses_in(killed) == losses_in(whole)
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, killed)]
    assert adapters[0] == adapters[1]


def test_ctrl_c_in_one_process_stops_both_at_the_same_step(words, tmp_path):
    """A terminal sends it to all; but one may finish a step before it comes, and another after."""
    out = tmp_path / "out"
    run = torchrun("-m", "minilora.cli", *words, "--epochs", "4000", "--out", str(out), stdout=subprocess.PIPE)
    while not (out / "metrics.jsonl").exists() or len(losses_in(out)) < 3:
        assert run.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGINT)

    assert f"go on    torchrun --nproc-per-node 2 -m minilora.cli resume {out}" in finish(run)
    assert read_checkpoint(out / "checkpoint.safetensors").step == len(losses_in(out)) < 4000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel", "ddp"], "this is no process of several: start it by `torchrun"),
        (["--parallel", "fsdp", "--eval-data", "some.jsonl"], "--eval-data is measured by one process: leave it out"),
    ],
)
def test_what_one_process_alone_can_do_is_refused(options, message, words, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)

    assert cli.main([*words, *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_several_processes_with_dropout_is_not_resumed(words, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(vars(options_of([*words[1:], "--parallel", "ddp", "--dropout=0.1"]))))

    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "do not save all random numbers that --dropout needs" in capsys.readouterr().err


def options_of(words):
    parser = cli.Parser()
    cli._train_arguments(parser)
    return parser.parse_args([*words, "--out", "out"])
