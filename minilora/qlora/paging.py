"""Pages: bytes that do not fit in fast memory live in slow memory, and come in when they are touched.

    page       page_bytes bytes with a number
    frame      a buffer of that size in fast memory, beside the parameters; it holds one page at a time
    budget     how many bytes of frames there may be; None: one for every page, and nothing ever moves
    fault      a page is touched that is in no frame
    eviction   the page that was touched longest ago goes out to the slow store and leaves its frame to another

    parameters on    fast store        slow store
    a CPU            memory            FileStore: a file on a disk
    a GPU            its memory        PinnedStore: the memory of the CPU

An operating system does the same below every program, and CUDA's unified memory, which QLoRA's paged optimizer uses,
does it between GPU and CPU ([QLoRA] section 3). By hand, what moves when can be read here, and counted.
"""

import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor


@runtime_checkable
class Store(Protocol):
    """Slow memory: pages by their numbers."""

    def reserve(self, n_pages: int) -> None:
        """Make room for so many pages, or raise before anything is lost."""

    def write(self, page: int, frame: Tensor) -> None:
        """Take a page out of a frame."""

    def read(self, page: int, frame: Tensor) -> None:
        """Put a page, once written, into a frame."""

    def prefetch(self, page: int) -> None:
        """Begin to fetch a page that will be read next; return at once."""


class FileStore:
    """Pages in a temporary file that has no name: however the process ends, nothing stays behind.

    They are read and written, not mapped into memory: a mapped page counts as resident until it is dropped, and on a
    full disk a mapping kills the process (SIGBUS) where a write raises an OSError.

    Raises:
        OSError: if there is no such folder, or when it has no room for the pages.
    """

    def __init__(self, page_bytes: int, folder: str | Path):
        self.page_bytes, self.folder = page_bytes, Path(folder)
        self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # it is gone with the store

    def reserve(self, n_pages: int) -> None:
        n_bytes = n_pages * self.page_bytes
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS: there a full disk shows at the first write
                os.posix_fallocate(self._file.fileno(), 0, n_bytes)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.folder} has no room for {n_bytes:,} bytes of optimizer states ({error.strerror}): "
                "give another folder as `store`, or keep the states in 8 bits",
            ) from error

    def write(self, page: int, frame: UInt8[Tensor, "page_bytes"]) -> None:
        bytes_, start, done = frame.numpy().data, page * self.page_bytes, 0
        while done < len(bytes_):  # the system may take fewer bytes than it was given
            done += os.pwrite(self._file.fileno(), bytes_[done:], start + done)

    def read(self, page: int, frame: UInt8[Tensor, "page_bytes"]) -> None:
        bytes_, start, done = frame.numpy().data, page * self.page_bytes, 0
        while done < len(bytes_):
            count = os.preadv(self._file.fileno(), [bytes_[done:]], start + done)
            if count == 0:
                raise OSError(f"page {page} of the optimizer's file in {self.folder} is gone: load the last checkpoint")
            done += count

    def prefetch(self, page: int) -> None:
        if hasattr(os, "posix_fadvise"):  # the kernel reads ahead into its cache while we compute
            start = page * self.page_bytes
            os.posix_fadvise(self._file.fileno(), start, self.page_bytes, os.POSIX_FADV_WILLNEED)


class PinnedStore:
    """Pages of a GPU's states in the CPU's page-locked memory. NOT RUN by us: we have no GPU.

    A page that is prefetched crosses the bus on a stream of its own while the GPU computes, into one frame more than
    the budget has (`staging`), and from there into its frame at the GPU's own speed.
    """

    def __init__(self, page_bytes: int, device: torch.device):
        self.page_bytes, self.device = page_bytes, device
        self._pages: list[Tensor] = []
        self._staging = torch.empty(page_bytes, dtype=torch.uint8, device=device)
        self._staged: int | None = None
        self._side: Any = torch.cuda.Stream(device)

    def reserve(self, n_pages: int) -> None:
        while len(self._pages) < n_pages:
            self._pages.append(torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=True))

    def write(self, page: int, frame: UInt8[Tensor, "page_bytes"]) -> None:
        self._pages[page].copy_(frame, non_blocking=True)
        self._staged = None if self._staged == page else self._staged

    def read(self, page: int, frame: UInt8[Tensor, "page_bytes"]) -> None:
        if self._staged == page:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
            frame.copy_(self._staging)
        else:
            frame.copy_(self._pages[page], non_blocking=True)

    def prefetch(self, page: int) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self.device))  # for its last write, and for the staging frame
        with torch.cuda.stream(self._side):
            self._staging.copy_(self._pages[page], non_blocking=True)
        self._staged = page


def open_store(page_bytes: int, device: torch.device, folder: Path) -> Store:
    """Give the slow memory that belongs to a device."""
    return PinnedStore(page_bytes, device) if device.type == "cuda" else FileStore(page_bytes, folder)


@dataclass
class Traffic:
    """What has moved so far."""

    faults: int = 0  # first touches included, for which nothing is read: a new page is all zeros
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def __str__(self) -> str:
        return f"{self.faults} faults, {self.evictions} evictions, {self.bytes_in:,} bytes in, {self.bytes_out:,} out"


class Pager:
    """Give the frame that holds a page, whatever must move for that.

    `make_store` is called when there are more pages than frames, not before.
    """

    def __init__(
        self, page_bytes: int, max_frames: int | None, device: torch.device, make_store: Callable[[], Store]
    ) -> None:
        self.page_bytes, self.max_frames, self.device = page_bytes, max_frames, device
        self.traffic = Traffic()
        self.n_pages = 0
        self._make_store = make_store
        self._store: Store | None = None
        self._free: list[Tensor] = []
        self._resident: dict[int, Tensor] = {}  # page -> frame; the page touched longest ago comes first
        self._written: set[int] = set()  # pages of which the store has a copy

    @property
    def is_paging(self) -> bool:
        """Whether there are more pages than frames."""
        return self.max_frames is not None and self.n_pages > self.max_frames

    @property
    def resident(self) -> frozenset[int]:
        """The pages that are in a frame now."""
        return frozenset(self._resident)

    def reserve(self, n_pages: int) -> None:
        """Make all frames and all room in the slow store, so that nothing runs out halfway through a step.

        Raises:
            MemoryError: if a frame cannot be had.
            OSError: as FileStore.
        """
        self.n_pages = n_pages
        if self.is_paging:
            self._store = self._store or self._make_store()
            self._store.reserve(n_pages)
        n_frames = n_pages if self.max_frames is None else min(n_pages, self.max_frames)
        while (made := len(self._free) + len(self._resident)) < n_frames:
            try:
                self._free.append(torch.empty(self.page_bytes, dtype=torch.uint8, device=self.device))
            except RuntimeError as error:  # torch's way to say that there is no memory
                self._free.clear()
                raise MemoryError(
                    f"no memory for page {made + 1} of {n_frames} of optimizer states, {self.page_bytes:,} bytes each: "
                    f"give a budget_bytes such as {max(1, made // 2) * self.page_bytes}, or keep the states in 8 bits"
                ) from error

    def touch(self, page: int) -> UInt8[Tensor, "page_bytes"]:
        """Give the frame that holds a page; it may be written to, until the next touch."""
        if page in self._resident:
            frame = self._resident.pop(page)
        else:
            self.traffic.faults += 1
            if not self._free:
                self._evict(next(iter(self._resident)))
            self._fill(page, self._free[-1])
            frame = self._free.pop()
        self._resident[page] = frame
        return frame

    def prefetch(self, page: int) -> None:
        """Tell the slow store that a page will be touched next."""
        if self._store is not None and page in self._written and page not in self._resident:
            self._store.prefetch(page)

    def _evict(self, page: int) -> None:
        assert self._store is not None, "reserve makes a frame for every page, or opens a store"
        self._store.write(page, self._resident[page])
        self._written.add(page)
        self._free.append(self._resident.pop(page))
        self.traffic.evictions += 1
        self.traffic.bytes_out += self.page_bytes

    def _fill(self, page: int, frame: Tensor) -> None:
        if self._store is None or page not in self._written:
            frame.zero_()
            return
        self._store.read(page, frame)
        self.traffic.bytes_in += self.page_bytes
