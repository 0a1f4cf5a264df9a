"""Work is shared out whole, on torch's own threads where it has some, in forks, and where no folder can be written."""

from types import ModuleType

import numba
import numpy as np
import pytest
import torch
from numba import types

from minilora.cpu import jobs

JOB = np.dtype([(name, np.int64) for name in ("taken", "counts", "count")])


def count_up(all_jobs):
    """Add one to every number, in pieces of three."""
    job = numba.carray(all_jobs, 1)[0]
    counts = numba.carray(jobs.address(job.counts), job.count, np.int64)
    while True:
        first = jobs.take(all_jobs, 3)
        if first >= job.count:
            return
        for place in range(first, min(first + 3, job.count)):
            counts[place] += 1


WORKER = numba.cfunc(types.void(types.CPointer(numba.from_dtype(JOB))))(count_up)  # kept nowhere: jobs may change


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 3, 100_000])
def test_every_piece_is_taken_once(count, two_threads):
    counts = torch.zeros(count, dtype=torch.int64)
    jobs.run(WORKER, count, counts.data_ptr(), count)

    assert torch.equal(counts, torch.ones(count, dtype=torch.int64))


def test_torchs_threads_are_asked_for_as_many_as_torch_uses(two_threads, monkeypatch):
    asked = []
    monkeypatch.setattr(jobs, "_gomp_parallel", lambda: lambda function, job, n_threads, flags: asked.append(n_threads))
    jobs.run(WORKER, 0, 0, 0)
    torch.set_num_threads(1)
    jobs.run(WORKER, 0, 0, 0)

    assert asked == [2]


@pytest.mark.parametrize("why", ["a forked child", "no OpenMP"])
def test_the_caller_does_all_where_there_are_no_threads(why, two_threads, monkeypatch):
    if why == "no OpenMP":
        monkeypatch.setattr(jobs, "_gomp_parallel", lambda: None)
    else:
        monkeypatch.setattr(jobs, "PROCESS", -1)
        monkeypatch.setattr(jobs, "_gomp_parallel", lambda: lambda *_: pytest.fail("threads that are not there"))
    counts = torch.zeros(10, dtype=torch.int64)
    jobs.run(WORKER, 10, counts.data_ptr(), 10)

    assert counts.tolist() == [1] * 10


def test_where_no_folder_can_be_written_kernels_are_compiled_all_the_same(monkeypatch):
    njit, cfunc = numba.njit, numba.cfunc

    def unwritable(compile_it):
        def refuse(*arguments: object, cache: bool = False, **options: object) -> object:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return compile_it(*arguments, **options)

        return refuse

    monkeypatch.setattr(numba, "njit", unwritable(njit))
    monkeypatch.setattr(numba, "cfunc", unwritable(cfunc))
    counts = torch.zeros(2, dtype=torch.int64)
    jobs.run(jobs.worker(count_up, JOB), 2, counts.data_ptr(), 2)

    assert jobs.compiled(lambda x: x + 1)(1) == 2
    assert counts.tolist() == [1, 1]


def test_what_a_worker_left_undone_is_an_error():
    with pytest.raises(RuntimeError, match="a compiled kernel stopped after 3 of 4: its error stands above"):
        jobs.run(WORKER, 4, 0, 0)


def test_a_digest_changes_with_any_source(tmp_path):
    one, other = ModuleType("one"), ModuleType("other")
    for package in (one, other):
        folder = tmp_path / package.__name__
        folder.mkdir()
        package.__file__ = str(folder / "__init__.py")
        (folder / "part.py").write_text("x = 1")
    before = jobs.digest_of(one, other)
    assert jobs.digest_of(one, other) == before
    (tmp_path / "other" / "part.py").write_text("x = 2")

    assert jobs.digest_of(one, other) != before
