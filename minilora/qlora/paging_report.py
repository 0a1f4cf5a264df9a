"""The optimizer's states under a microscope: which tensor is 8-bit, which is paged, which neither, and why.

Read before this file: moments, paging.
"""

from dataclasses import dataclass

from torch import Tensor

from minilora.qlora.moments import MIN_8BIT_VALUES, Run
from minilora.qlora.paging import Pager, Traffic


@dataclass(frozen=True)
class TensorReport:
    """How a parameter's moments are kept, and why."""

    name: str
    shape: tuple[int, ...]
    state_bits: int
    state_bytes: int
    is_paged: bool
    n_pages: int  # that hold any of it
    n_resident: int  # of them, in fast memory now
    why: str

    def __str__(self) -> str:
        return f"{self.name} {self.shape}: {self.why}"


@dataclass(frozen=True)
class PagingReport:
    """Every parameter's moments, and what has moved."""

    tensors: list[TensorReport]
    traffic: Traffic

    def __str__(self) -> str:
        n_bytes = sum(tensor.state_bytes for tensor in self.tensors)
        return "\n".join([*map(str, self.tensors), f"{n_bytes:,} bytes of moments; {self.traffic}"])


def report_on(name: str, p: Tensor, bits: int, asked_bits: int, runs: list[Run], pager: Pager) -> TensorReport:
    """Say how a parameter's moments are kept: in `bits` where the user asked for `asked_bits`, in these runs."""
    pages = {run.address // pager.page_bytes for run in runs}
    n_resident = len(pages & pager.resident)
    why_bits = f"{bits} bits" + (f", for it has fewer than {MIN_8BIT_VALUES:,} values" * (bits != asked_bits))
    if not runs:
        where = "no moments yet, for it has had no gradient"
    elif pager.max_frames is None:
        where = "resident: there is no budget"
    elif not pager.is_paging:
        where = f"resident: all {pager.n_pages} pages of moments fit in the budget, which holds {pager.max_frames}"
    else:
        where = (
            f"paged, {n_resident} of its {len(pages)} pages are in: there are {pager.n_pages} pages of moments, "
            f"and the budget holds {pager.max_frames}"
        )
    is_paged, n_bytes = bool(runs) and pager.is_paging, sum(run.n_bytes for run in runs)
    return TensorReport(name, tuple(p.shape), bits, n_bytes, is_paged, len(pages), n_resident, f"{why_bits}; {where}")
