"""AdamW whose moments may be kept in 8 bits, and in pages that come in when they are touched.

    p, g       a parameter, its gradient
    m, v       the moments: running means of g and of g², which AdamW keeps for every value that it trains
    budget     bytes of moments in fast memory; the rest is in a file, or for a GPU in the CPU's memory

Where a moment lies changes nothing in a step: the arithmetic is in float32, value by value, and a block of 256 values
that share a unit never spans two pages. So every budget gives the same bits; in 32 bits they are those of
torch.optim.AdamW(fused=True).

Read before this file: moments, paging.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.optim import Optimizer

from minilora.qlora import moments
from minilora.qlora.moments import MIN_8BIT_VALUES, PARTS, Run, cut, lay_out, length_of, parts_of
from minilora.qlora.paging import Pager, Traffic, open_store
from minilora.qlora.paging_report import PagingReport, report_on

PIECE = 65_536  # values computed at once: the temporaries of 8 bits take 256 KiB each, which a cache holds
PAGE_MULTIPLE = 4096  # bytes: disks and operating systems move no less

# As torch decorates them, the first call of any imports its compiler: 2 s, and 136 MiB for good.
add_param_group, zero_grad, state_dict_of, load_state_dict = (
    inspect.unwrap(getattr(Optimizer, name))
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
)


class PagedAdamW(Optimizer):
    """torch.optim.AdamW in less memory: `state_bits=8` keeps a quarter, `budget_bytes` bounds what is left.

        m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
        p ← (1 − lr · weight_decay) p − lr · m̂ / (√v̂ + eps)           [AdamW] algorithm 2
        m ≈ map[codes] · absmax[block], and v likewise                [8bit] section 2.1
        what does not fit the budget is evicted, until its part of the next step    [QLoRA] section 3

    Moments are made at a parameter's first gradient. `store` is the folder of the file; by default /var/tmp, which is
    on a disk where /tmp may be memory. A GPU's pages go to the CPU's memory (written, not run by us: we have no GPU).

    bitsandbytes pages no tensor below 100,000 values. Here small tensors share pages, and all moments count.

    Raises:
        ValueError: if an argument is out of its range, there is nothing to train, or a parameter is not trainable here.

    >>> p = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = PagedAdamW([p], state_bits=8, budget_bytes=2**21)
    >>> p.sum().backward()
    >>> optimizer.step()
    >>> print(optimizer.report())
    0.0 (64, 128): 8 bits; resident: all 1 pages of moments fit in the budget, which holds 1
    16,640 bytes of moments; 1 faults, 0 evictions, 0 bytes in, 0 out
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        budget_bytes: int | None = None,
        page_bytes: int = 2**21,
        store: str | Path | None = None,
    ) -> None:
        params = list(params)
        if not params:
            raise ValueError("there are no parameters to train, the list is empty: give some, or unfreeze some")
        self.folder = disk_folder() if store is None else Path(store)
        check_paging(state_bits, budget_bytes, page_bytes, self.folder)
        self.state_bits, self.budget_bytes, self.page_bytes = state_bits, budget_bytes, page_bytes
        self._is_backward = False  # the direction of the next walk
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if not any(p.requires_grad for _, p in self._numbered()):
            raise ValueError(
                "there are no parameters to train, all are frozen: unfreeze some, or inject adapters before"
            )
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, with settings of their own if they have any.

        Raises:
            ValueError: as PagedAdamW.
        """
        add_param_group(self, param_group)
        try:
            check_settings(self.param_groups[-1])
            check_trainable([p for group in self.param_groups for p in group["params"]])
        except ValueError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or fill them with zeros."""
        zero_grad(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of AdamW on every parameter that has a gradient; return what `closure` returns.

        It walks through the pages in the opposite direction of the step before. Always the same way round, the page
        touched longest ago would be the one needed next: every page would fault in every step.

        Raises, before anything is changed:
            ValueError: if a gradient is sparse.
            MemoryError: if there is no memory for the moments, or for the budget.
            OSError: if the store's folder has no room for the pages.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        check_dense([p.grad for _, p in work])
        self._place([p for _, p in work])
        for _, p in work:
            self.state[p]["step"] += 1
            p.grad = p.grad.contiguous()
        visits = [(group, p, run) for group, p in work for run in self._runs[p]]
        if self._is_backward:
            visits.reverse()
        self._is_backward = not self._is_backward
        for (group, p, run), following in zip_longest(visits, visits[1:]):
            frame = self._pager.touch(run.address // self.page_bytes)
            if following is not None:
                self._pager.prefetch(following[2].address // self.page_bytes)
            self._update(group, p, run, frame)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor, run: Run, frame: Tensor) -> None:
        """Step the values of one run, whose page is in a frame."""
        assert p.grad is not None
        values, gradients, parts = p.detach().view(-1), p.grad.view(-1), parts_of(run, frame)
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        for start in range(run.start, run.stop, PIECE):
            stop = min(start + PIECE, run.stop)
            piece = cut(parts, start - run.start, stop - run.start)
            m, v = moments.read(piece)
            values32 = values[start:stop].float()  # a view, where they are float32 already
            adamw_(values32, gradients[start:stop].float(), m, v, step=self.state[p]["step"], **settings)
            moments.write(piece, m, v)
            if p.dtype != torch.float32:
                values[start:stop] = values32

    def state_dict(self) -> dict[str, Any]:
        """Give all settings and moments as plain numbers and tensors: copies, in memory, whatever the budget.

        Of every parameter, flattened: "step" and "m", "v"; or "m_codes", "v_codes" and a unit a block in "m_absmax",
        "v_absmax". torch.optim.AdamW cannot read it, nor PagedAdamW torch's.
        """
        state_dict = state_dict_of(self)
        for index, p in self._numbered():
            if p in self._runs:
                whole = {
                    name: torch.empty(length_of(name, p.numel()), dtype=dtype, device=p.device)
                    for name, dtype in PARTS[self._bits(p)].items()
                }
                for run, parts in self._visit(p):
                    for name, piece in cut(whole, run.start, run.stop).items():
                        piece.copy_(parts[name])
                state_dict["state"][index] = {"step": self.state[p]["step"], **whole}
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict, bit for bit; budget and page size may be others than they were.

        Raises:
            ValueError: if it does not fit these parameters and `state_bits`: all misfits are named, nothing is changed.
        """
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"this is no optimizer's state_dict: it has {', '.join(map(str, state_dict)) or 'nothing'}"
            )
        theirs, sizes = state_dict["state"], [len(group["params"]) for group in self.param_groups]
        problems = [text for index, p in self._numbered() for text in self._misfits(index, p, theirs.get(index))]
        if (their_sizes := [len(group["params"]) for group in state_dict["param_groups"]]) != sizes:
            problems = [f"it has groups of {their_sizes} parameters, the optimizer has {sizes}"]
        if problems:
            raise ValueError("this state does not fit the optimizer:\n  " + "\n  ".join(problems))
        steps = {index: {"step": theirs[index]["step"]} for index, _ in self._numbered() if index in theirs}
        load_state_dict(self, {**state_dict, "state": steps})
        self._forget()
        loaded = {p: theirs[index] for index, p in self._numbered() if index in theirs}
        self._place(list(loaded))
        for p, state in loaded.items():
            whole = {name: state[name] for name in PARTS[self._bits(p)]}
            for run, parts in self._visit(p):
                for name, piece in cut(whole, run.start, run.stop).items():
                    parts[name].copy_(piece)

    def report(self) -> PagingReport:
        """Say of every parameter how its moments are kept, and why."""
        tensors = [
            report_on(name, p, self._bits(p), self.state_bits, self._runs.get(p, []), self._pager)
            for name, p in self._named()
        ]
        return PagingReport(tensors, replace(self.traffic))

    @property
    def traffic(self) -> Traffic:
        """Faults, evictions and bytes moved, since the optimizer was made or its state was loaded."""
        return self._pager.traffic

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a PagedAdamW cannot be copied or pickled, for its pages would stay behind: use its state_dict")

    def _forget(self) -> None:
        """Drop all moments, and where they lie."""
        max_frames = None if self.budget_bytes is None else self.budget_bytes // self.page_bytes
        device = next(p.device for _, p in self._numbered())
        make_store = partial(open_store, self.page_bytes, device, self.folder)
        self._pager = Pager(self.page_bytes, max_frames, device, make_store)
        self._runs: dict[Tensor, list[Run]] = {}
        self._end = 0  # the address behind the last run

    def _place(self, parameters: list[Tensor]) -> None:
        """Find the moments of these parameters a place behind all others, where they have none yet."""
        for p in parameters:
            if p not in self._runs:
                self._runs[p], self._end = lay_out(p.numel(), self._bits(p), self._end, self.page_bytes)
                self.state[p].setdefault("step", 0)
        self._pager.reserve(-(-self._end // self.page_bytes))

    def _visit(self, p: Tensor) -> Iterator[tuple[Run, dict[str, Tensor]]]:
        for run in self._runs[p]:
            yield run, parts_of(run, self._pager.touch(run.address // self.page_bytes))

    def _bits(self, p: Tensor) -> int:
        return self.state_bits if p.numel() >= MIN_8BIT_VALUES else 32

    def _misfits(self, index: int, p: Tensor, theirs: dict[str, Any] | None) -> list[str]:
        bits = self._bits(p)
        if theirs is None or p.numel() == 0:
            return []
        if theirs.keys() != {"step", *PARTS[bits]}:
            others = [n for n, parts in PARTS.items() if theirs.keys() == {"step", *parts}]
            hint = f"it was made with state_bits={others[0]}" if others else "it is of another optimizer"
            return [f"parameter {index}: it has {', '.join(theirs)}; {bits} bits are {', '.join(PARTS[bits])}: {hint}"]
        return [
            f"parameter {index}: {name} has {tuple(theirs[name].shape)} of {theirs[name].dtype}, "
            f"not ({length_of(name, p.numel())},) of {dtype}"
            for name, dtype in PARTS[bits].items()
            if theirs[name].shape != (length_of(name, p.numel()),) or theirs[name].dtype != dtype
        ]

    def _numbered(self) -> Iterator[tuple[int, Tensor]]:
        """All parameters with their numbers in a state dict."""
        return enumerate(p for group in self.param_groups for p in group["params"])

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters with the names they were given, or else group.number."""
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            yield from zip(names, group["params"], strict=True)


def adamw_(
    p: Float32[Tensor, "n"],
    g: Float32[Tensor, "n"],
    m: Float32[Tensor, "n"],
    v: Float32[Tensor, "n"],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take step number `step` (from 1) of AdamW in place: p, m and v change.

        m ← β₁ m + (1 − β₁) g            m̂ = m / (1 − β₁ˢᵗᵉᵖ)
        v ← β₂ v + (1 − β₂) g²           v̂ = v / (1 − β₂ˢᵗᵉᵖ)
        p ← (1 − lr · weight_decay) p − lr · m̂ / (√v̂ + eps)          [AdamW] algorithm 2

    The decay acts on p itself, not through g: √v̂ does not divide it. One kernel of torch's does all of it, in one pass
    over the four; it is the one behind torch.optim.AdamW(fused=True), so the bits are the same (torch has no public
    name for it; a test compares the bits).
    """
    torch._fused_adamw_(
        [p],
        [g],
        [m],
        [v],
        [],
        [torch.full((), float(step), device=p.device)],  # not torch.tensor: that would wait for a GPU
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def disk_folder() -> Path:
    """Where pages go unless a folder is given."""
    return Path("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())


def check_paging(state_bits: int, budget_bytes: int | None, page_bytes: int, folder: Path) -> None:
    """Refuse what cannot be paged; ValueErrors as in PagedAdamW."""
    if state_bits not in (8, 32):
        raise ValueError(f"state_bits is {state_bits!r}: choose 32 (AdamW's own) or 8 (a quarter of the memory)")
    if page_bytes < PAGE_MULTIPLE or page_bytes % PAGE_MULTIPLE:
        raise ValueError(f"page_bytes is {page_bytes}: choose a multiple of {PAGE_MULTIPLE}, such as {2**21}")
    if budget_bytes is not None and budget_bytes < page_bytes:
        raise ValueError(
            f"a budget of {budget_bytes:,} bytes does not hold one page of {page_bytes:,}: "
            "raise budget_bytes or lower page_bytes"
        )
    if budget_bytes is not None and not folder.is_dir():
        raise ValueError(f"store is {str(folder)!r}, which is no folder: give one on a disk with room for the moments")


def check_settings(group: dict[str, Any]) -> None:
    """Refuse settings that no step can use; ValueErrors as in PagedAdamW."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < float("inf"):
            raise ValueError(f"{name} is {group[name]}: choose 0 or a positive number")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are {group['betas']}: choose two numbers of at least 0 and below 1, as (0.9, 0.999)")


def check_trainable(parameters: list[Tensor]) -> None:
    """Refuse parameters whose step cannot be computed in float32, page by page; ValueErrors as in PagedAdamW."""
    for p in parameters:
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"a parameter is {p.dtype}: moments are float32, so use torch.optim.AdamW for it")
        if not p.is_contiguous():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not contiguous: make it so, p.data.contiguous()"
            )
    if len(devices := sorted({str(p.device) for p in parameters})) > 1:
        raise ValueError(f"parameters are on {' and '.join(devices)}: make one optimizer for each device")


def check_dense(gradients: list[Tensor]) -> None:
    """Refuse sparse gradients; ValueErrors as in PagedAdamW.step."""
    for g in gradients:
        if g.layout != torch.strided:
            raise ValueError(f"a gradient of shape {tuple(g.shape)} is sparse: make the embedding with sparse=False")
