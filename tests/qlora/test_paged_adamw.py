"""PagedAdamW: torch's bits in 32 bits; the same bits in any budget; memory is bounded; bad input is refused."""

import copy
import io
import math
import os
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilora.qlora import PagedAdamW
from minilora.qlora.blockwise import encode_8bit
from minilora.qlora.codebooks import dynamic_cells, dynamic_map, dynamic_thresholds
from minilora.qlora.moments import BLOCK_SIZE, lay_out
from minilora.qlora.paged_adamw import adamw_
from minilora.qlora.paging import FileStore, Pager

CPU = torch.device("cpu")
PAGE = 4096  # the smallest page: these tensors fill about thirty in 32 bits, ten in 8
SHAPES = [(96, 64), (4999,), (7,), (3, 1500), (1,), (0,), (4096,), (4095,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], number: int) -> None:
    """Gradients of step `number`, of sizes far apart; now and then a parameter has none."""
    generator = torch.Generator().manual_seed(number)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator) * 10.0 ** ((number + i) % 7 - 4)
        p.grad = None if (number + i) % 5 == 4 else g.to(p.dtype)


def take_steps(params, optimizer, numbers) -> None:
    for number in numbers:
        set_gradients(params, number)
        optimizer.step()


def same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_32_bits_are_the_bits_of_torchs_adamw():
    ours, theirs = parameters(), parameters()
    take_steps(ours, PagedAdamW(ours, lr=1e-2, weight_decay=0.1), range(200))
    take_steps(theirs, torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True), range(200))

    assert same(ours, theirs)


def test_32_bits_stay_within_1e6_of_torchs_adamw_step_by_step():
    """torch's plain operations round in another order than its fused kernel."""
    ours, theirs = parameters(), parameters()
    take_steps(ours, PagedAdamW(ours, lr=1e-2, weight_decay=0.1), range(200))
    take_steps(theirs, torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False), range(200))

    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_groups_have_rates_and_decays_of_their_own():
    ours, theirs = parameters(), parameters()
    for params, make in ((ours, PagedAdamW), (theirs, partial(torch.optim.AdamW, fused=True))):
        groups = [{"params": params[:3], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": params[3:], "weight_decay": 0.5}]
        take_steps(params, make(groups), range(20))

    assert same(ours, theirs)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("n_frames", [1, 3, 28, 1000])
def test_any_budget_gives_the_same_bits_for_200_steps(n_frames, state_bits):
    ours, theirs = parameters(), parameters()
    optimizer = PagedAdamW(ours, state_bits=state_bits, budget_bytes=n_frames * PAGE, page_bytes=PAGE)
    take_steps(ours, optimizer, range(200))
    take_steps(theirs, PagedAdamW(theirs, state_bits=state_bits), range(200))

    assert same(ours, theirs)
    assert (optimizer.traffic.evictions > 0) == optimizer._pager.is_paging


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 255, 256, 257, 3000, 4096, 4351, 9000, 70_000]), min_size=1, max_size=5),
    state_bits=st.sampled_from([8, 32]),
    page_multiple=st.integers(1, 9),
    n_frames=st.integers(1, 40),
    steps=st.integers(1, 4),
)
def test_neither_pages_nor_budget_show_in_the_result(sizes, state_bits, page_multiple, n_frames, steps):
    page_bytes = page_multiple * PAGE
    start = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    paged = PagedAdamW(ours, state_bits=state_bits, page_bytes=page_bytes, budget_bytes=n_frames * page_bytes)
    take_steps(ours, paged, range(steps))
    take_steps(theirs, PagedAdamW(theirs, state_bits=state_bits), range(steps))

    assert same(ours, theirs)
    assert len(paged._pager.resident) <= n_frames


@given(
    n_values=st.integers(0, 20_000),
    bits=st.sampled_from([8, 32]),
    address=st.integers(0, 3000).map(lambda n: 8 * n),
    page_multiple=st.integers(1, 5),
)
def test_runs_cover_a_parameter_once_with_whole_blocks_and_no_run_crosses_a_page(
    n_values, bits, address, page_multiple
):
    page_bytes = page_multiple * PAGE
    runs, end = lay_out(n_values, bits, address, page_bytes)
    places = [(run.address, run.address + run.n_bytes) for run in runs]

    assert [value for run in runs for value in range(run.start, run.stop)] == list(range(n_values))
    assert all(run.start % BLOCK_SIZE == 0 and run.address % 8 == 0 for run in runs)
    assert all(first // page_bytes == (behind - 1) // page_bytes for first, behind in places)
    assert all(behind <= then for (_, behind), (then, _) in pairwise([*places, (end, end)]))
    assert address <= (places[0][0] if places else end)
    assert end % 8 == 0  # where float32 may begin again


# 8 bits


def test_no_cell_of_the_map_holds_two_thresholds_and_every_code_is_the_nearest():
    for signed in (True, False):
        thresholds, values = dynamic_thresholds(CPU, signed=signed)[:-1], dynamic_map(CPU, signed=signed)
        cells = thresholds.view(torch.int32) >> 16
        assert len(cells.unique()) == len(thresholds)
        assert dynamic_cells(CPU, signed=signed).numel() == 2**16

        around = [torch.nextafter(thresholds, torch.tensor(to)) for to in (-2.0, 2.0)]
        x = torch.cat([thresholds, *around, values, torch.linspace(-1, 1, 65_537), torch.tensor([1e-40, -1e-40, -0.0])])
        x = torch.cat([torch.cat([piece, torch.ones(1)]) for piece in x.split(255)])  # a 1 in each block: units are 1
        codes, absmax = encode_8bit(x, signed=signed)
        assert torch.equal(codes.long(), torch.bucketize(x, thresholds))
        assert torch.equal(absmax, torch.ones_like(absmax))


def test_8_bits_take_at_most_26_hundredths_of_the_bytes_of_32():
    params = [nn.Parameter(torch.zeros(1000, 500)), nn.Parameter(torch.zeros(4096))]
    taken = {}
    for bits in (8, 32):
        optimizer = PagedAdamW(params, state_bits=bits)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        taken[bits] = sum(tensor.state_bytes for tensor in optimizer.report().tensors)

    assert taken[32] == 8 * (500_000 + 4096)
    assert taken[8] <= 0.26 * taken[32]  # (2 + 8/256) / 8 = 0.254


def test_half_precision_parameters_are_stepped_in_float32_and_rounded_once():
    (p,) = params = [nn.Parameter(torch.randn(300).bfloat16())]
    exact, m, v = p.detach().float(), torch.zeros(300), torch.zeros(300)
    p.grad = torch.randn(300).bfloat16()
    PagedAdamW(params, lr=0.1).step()
    adamw_(exact, p.grad.float(), m, v, step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)

    assert torch.equal(p, exact.bfloat16())


# paging


def test_a_page_that_was_touched_longest_ago_goes_out_first_and_comes_back_as_it_was(tmp_path):
    pager = Pager(PAGE, 2, CPU, lambda: FileStore(PAGE, tmp_path))
    pager.reserve(3)
    for page in (0, 1, 0, 2):  # 1 is the oldest when 2 comes
        pager.touch(page).fill_(page + 1)
    assert pager.resident == {0, 2}

    assert torch.equal(pager.touch(1), torch.full((PAGE,), 2, dtype=torch.uint8))
    assert pager.resident == {2, 1}
    assert vars(pager.traffic) == {"faults": 4, "evictions": 2, "bytes_in": PAGE, "bytes_out": 2 * PAGE}


@settings(deadline=None, max_examples=50)
@given(n_frames=st.integers(1, 5), touches=st.lists(st.integers(0, 6), max_size=60))
def test_a_pager_counts_as_a_list_in_order_of_use_does(n_frames, touches):
    pager = Pager(PAGE, n_frames, CPU, lambda: FileStore(PAGE, "/var/tmp"))
    pager.reserve(7)
    resident, faults, content = [], 0, {}
    for number, page in enumerate(touches):
        faults += page not in resident
        resident = [*(other for other in resident if other != page), page][-n_frames:]
        frame = pager.touch(page)
        assert frame[0] == content.get(page, 0)
        frame.fill_(number + 1)
        content[page] = number + 1

    assert pager.resident == set(resident)
    assert pager.traffic.faults == faults
    assert pager.traffic.bytes_out == PAGE * max(0, faults - n_frames)


def test_a_walk_there_and_back_faults_only_for_what_the_budget_cannot_hold():
    p = nn.Parameter(torch.zeros(10 * PAGE // 8))
    optimizer = PagedAdamW([p], budget_bytes=4 * PAGE, page_bytes=PAGE)
    p.grad = torch.ones_like(p)
    faults = []
    for _ in range(5):
        before = optimizer.traffic.faults
        optimizer.step()
        faults.append(optimizer.traffic.faults - before)

    assert faults == [10, 6, 6, 6, 6]


def test_the_next_page_is_asked_for_before_it_is_touched(monkeypatch):
    asked, read = [], []
    original = FileStore.read
    monkeypatch.setattr(FileStore, "prefetch", lambda self, page: asked.append(page))
    monkeypatch.setattr(FileStore, "read", lambda self, page, frame: (read.append(page), original(self, page, frame)))
    p = nn.Parameter(torch.zeros(6 * PAGE // 8))
    optimizer = PagedAdamW([p], budget_bytes=2 * PAGE, page_bytes=PAGE)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()

    assert asked == read == [3, 2, 1, 0]


def test_nothing_lies_in_the_folder_while_pages_are_in_it(tmp_path):
    params = parameters()
    optimizer = PagedAdamW(params, budget_bytes=PAGE, page_bytes=PAGE, store=tmp_path)
    take_steps(params, optimizer, range(2))

    assert optimizer.traffic.bytes_out > 0
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(optimizer._pager._store._file.fileno()).st_dev == tmp_path.stat().st_dev


def test_no_file_is_made_where_everything_fits():
    params = parameters()
    optimizer = PagedAdamW(params, budget_bytes=2**22)
    take_steps(params, optimizer, range(2))

    assert optimizer._pager._store is None


# state


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("budget_before, budget_after", [(None, PAGE), (PAGE, None), (2 * PAGE, 5 * PAGE)])
def test_a_saved_state_continues_bit_for_bit_in_another_budget(budget_before, budget_after, state_bits):
    through, broken = parameters(), parameters()
    take_steps(through, PagedAdamW(through, lr=0.02, state_bits=state_bits), range(20))

    first = PagedAdamW(broken, lr=0.02, state_bits=state_bits, budget_bytes=budget_before, page_bytes=PAGE)
    take_steps(broken, first, range(9))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    page_after = PAGE if budget_after == PAGE else 2 * PAGE
    second = PagedAdamW(broken, state_bits=state_bits, budget_bytes=budget_after, page_bytes=page_after)
    second.load_state_dict(torch.load(file, weights_only=True))  # tensors and plain numbers: no code is run
    take_steps(broken, second, range(9, 20))

    assert same(through, broken)


def test_a_state_dict_is_a_copy_and_loading_drops_what_was_there():
    params = parameters()
    optimizer = PagedAdamW(params, budget_bytes=PAGE, page_bytes=PAGE)
    fresh = copy.deepcopy(optimizer.state_dict())
    take_steps(params, optimizer, range(3))
    saved = optimizer.state_dict()
    m = saved["state"][0]["m"].clone()
    take_steps(params, optimizer, range(3))
    assert torch.equal(saved["state"][0]["m"], m)

    optimizer.load_state_dict(fresh)
    assert optimizer.state_dict()["state"] == {}
    take_steps(params, optimizer, [0])
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_a_state_that_does_not_fit_is_refused_with_every_misfit_and_nothing_changes():
    params, other = parameters(), [nn.Parameter(torch.zeros(9, 64)), *parameters()[1:]]
    ours, theirs, in_8_bits = PagedAdamW(params), PagedAdamW(other), PagedAdamW(other, state_bits=8)
    for optimizer, its in ((ours, params), (theirs, other), (in_8_bits, other)):
        take_steps(its, optimizer, range(2))
    before = ours.state_dict()["state"][0]["m"].clone()

    with pytest.raises(
        ValueError, match=r"does not fit .*\n  parameter 0: m has \(576,\) of torch.float32, not \(6144"
    ):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"parameter 1: it has step, m_absmax.*; 32 bits are m, v"):
        ours.load_state_dict(in_8_bits.state_dict())
    with pytest.raises(ValueError, match=r"it has groups of \[1\] parameters, the optimizer has \[8\]"):
        ours.load_state_dict(PagedAdamW(other[:1]).state_dict())
    assert torch.equal(ours.state_dict()["state"][0]["m"], before)


def test_copies_and_pickles_are_refused():
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*use its state_dict"):
        copy.deepcopy(PagedAdamW(parameters()))


# report


def test_the_report_says_of_every_tensor_what_is_8_bit_what_is_paged_and_why():
    model = nn.Linear(64, 128)
    frozen = ("frozen", nn.Parameter(torch.zeros(3)))
    for n_frames, where in (
        (None, "resident: there is no budget"),
        (6, "resident: all 6 pages of moments fit in the budget, which holds 6"),
        (4, "paged, 3 of its 5 pages are in: there are 6 pages of moments, and the budget holds 4"),
    ):
        budget = None if n_frames is None else n_frames * PAGE
        optimizer = PagedAdamW([*model.named_parameters(), frozen], state_bits=8, budget_bytes=budget, page_bytes=PAGE)
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        weight, bias, still = optimizer.report().tensors
        assert weight.is_paged == bias.is_paged == (n_frames == 4)
        assert str(weight).endswith(where)
        assert str(weight).startswith("weight (128, 64): 8 bits; ")
        assert str(bias).startswith("bias (128,): 32 bits, for it has fewer than 4,096 values; ")
        assert str(still).endswith("no moments yet, for it has had no gradient")
    assert re.search(
        r"bytes of moments; \d+ faults, \d+ evictions, [\d,]+ bytes in, [\d,]+ out$", str(optimizer.report())
    )


# bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lr": -1.0}, "lr is -1.0: choose 0 or a positive number"),
        ({"lr": math.nan}, "lr is nan: choose"),
        ({"eps": -1e-9}, "eps is -1e-09: choose"),
        ({"weight_decay": math.inf}, "weight_decay is inf: choose"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\): choose two numbers of at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas are \(-0.1, 0.9\): choose"),
        ({"state_bits": 16}, r"state_bits is 16: choose 32 \(AdamW's own\) or 8"),
        ({"budget_bytes": 4095, "page_bytes": PAGE}, "a budget of 4,095 bytes does not hold one page of 4,096: raise"),
        ({"budget_bytes": -1}, "a budget of -1 bytes does not hold one page"),
        ({"page_bytes": 5000}, "page_bytes is 5000: choose a multiple of 4096"),
        ({"page_bytes": 0}, "page_bytes is 0: choose a multiple of 4096"),
        ({"budget_bytes": 2**21, "store": "/no/such"}, "store is '/no/such', which is no folder: give one on a disk"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(parameters(), **arguments)


@pytest.mark.parametrize(
    "params, message",
    [
        ([], "no parameters to train, the list is empty: give some, or unfreeze some"),
        (
            [nn.Parameter(torch.zeros(3), requires_grad=False)],
            "all are frozen: unfreeze some, or inject adapters before",
        ),
        ([nn.Parameter(torch.zeros(3, dtype=torch.float64))], "is torch.float64.*use torch.optim.AdamW for it"),
        ([nn.Parameter(torch.zeros(3, 4).T)], r"of shape \(4, 3\) is not contiguous: make it so"),
        ([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))], "are on cpu and meta: make one"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(params)


def test_a_state_of_something_else_is_refused_with_a_guess():
    frozen_too = [nn.Parameter(torch.zeros(8192)), nn.Parameter(torch.zeros(8), requires_grad=False)]
    states = {}
    for bits in (8, 32):
        optimizer = PagedAdamW(frozen_too, state_bits=bits)
        frozen_too[0].grad = torch.ones(8192)
        optimizer.step()
        states[bits] = optimizer.state_dict()
    theirs = torch.optim.AdamW(frozen_too[:1])
    theirs.step()
    for state, message in (
        (states[8], "it was made with state_bits=8"),
        (theirs.state_dict() | {"param_groups": states[8]["param_groups"]}, "it is of another optimizer"),
        ({}, "no optimizer's state_dict: it has nothing"),
        ({"weight": torch.ones(3)}, "no optimizer's state_dict: it has weight"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedAdamW(frozen_too).load_state_dict(state)


def test_a_bad_group_that_is_added_later_is_refused_and_not_kept():
    optimizer = PagedAdamW(parameters())
    with pytest.raises(ValueError, match="lr is -3: choose"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": -3})

    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_anything_changes():
    linear, embedding = nn.Linear(4, 2), nn.Embedding(5, 4, sparse=True)
    optimizer = PagedAdamW([*linear.parameters(), *embedding.parameters()])
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = linear.weight.clone()

    with pytest.raises(ValueError, match=r"gradient of shape \(5, 4\) is sparse: make the embedding with sparse=False"):
        optimizer.step()
    assert torch.equal(linear.weight, before)
    assert optimizer.state_dict()["state"] == {}


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])

    def closure() -> torch.Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (p < 1).all()


# limits of the system, in processes of their own

LIMITED = """
import resource, sys
from pathlib import Path
import torch
from minilora.qlora import PagedAdamW

def data_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return 1024 * int(line.split()[1])

torch.set_num_threads(1)
warm = torch.nn.Parameter(torch.ones(70_000))  # what torch itself allocates at the first step is no part of the matter
warm.grad = torch.ones(70_000)
PagedAdamW([warm], state_bits=int(sys.argv[1])).step()
params = [torch.nn.Parameter(torch.ones(n)) for n in (5_000_000, 3_000_000)]
for p in params:
    p.grad = torch.full_like(p, 0.5)
budget = None if sys.argv[2] == "None" else int(sys.argv[2])
optimizer = PagedAdamW(params, state_bits=int(sys.argv[1]), budget_bytes=budget, store=sys.argv[3])
name, value = sys.argv[4], int(sys.argv[5])
limit = value + (data_bytes() if name == "RLIMIT_DATA" else 0)
resource.setrlimit(getattr(resource, name), (limit, limit))
try:
    for _ in range(3):
        optimizer.step()
except (MemoryError, OSError) as error:
    print(type(error).__name__, error, all(p.min() == p.max() == 1 for p in params))
else:
    print("finished", optimizer.traffic, [p[0].item() for p in params])
"""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux")
MIB = 2**20


def run_limited(state_bits: int, budget: int | None, folder: Path, limit: str, value: int) -> str:
    command = [sys.executable, "-c", LIMITED, *map(str, (state_bits, budget, folder, limit, value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, as the kernel lists it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point))[1]


@pytest.fixture
def disk() -> Path:
    """Where pages go by default, if that is a disk: on tmpfs they would be memory, and the test would show nothing."""
    folder = Path("/var/tmp")
    kind = file_system(folder)
    assert kind not in ("tmpfs", "ramfs"), f"{folder} is on {kind}: this test needs a folder on a disk"
    return folder


@needs_linux
@pytest.mark.parametrize("state_bits, limit, budget", [(32, 32 * MIB, 8 * MIB), (8, 12 * MIB, 4 * MIB)])
def test_where_moments_do_not_fit_in_memory_a_budget_finishes(disk, state_bits, limit, budget):
    """8 million values: 64 MB of moments in 32 bits, 16 MB in 8. All counts equal but the limit."""
    without = run_limited(state_bits, None, disk, "RLIMIT_DATA", limit)
    assert re.match(
        r"MemoryError no memory for page \d+ of \d+ of .*give a budget_bytes such as \d+, or keep the states in 8 bits",
        without,
    )
    assert without.rstrip().endswith("True")  # no parameter was changed

    paged = run_limited(state_bits, budget, disk, "RLIMIT_DATA", limit)
    params = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.AdamW(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    assert paged.startswith("finished")
    assert str([p.item() for p in params]) in paged


@needs_linux
def test_a_full_disk_is_said_before_a_parameter_changes(disk):
    said = run_limited(32, 8 * MIB, disk, "RLIMIT_FSIZE", MIB)

    assert re.match(r"OSError .*/var/tmp has no room for [\d,]+ bytes of optimizer states .*another folder", said)
    assert said.rstrip().endswith("True")


def test_torchs_compiler_is_not_imported():
    """It takes 2 s and 136 MiB, and every torch.optim optimizer imports it as soon as it is made."""
    program = (
        "import sys, torch; from minilora.qlora import PagedAdamW; p = torch.nn.Parameter(torch.ones(3));"
        "optimizer = PagedAdamW([p]); p.sum().backward(); optimizer.step(); optimizer.zero_grad();"
        "optimizer.load_state_dict(optimizer.state_dict());"
        "assert p.grad is None; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"
