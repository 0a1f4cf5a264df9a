"""Many adapters registered, few in memory: loaded from their folders when asked for, the longest unused dropped first.

    registered   a name and a folder; its config and its file's header have been read, its numbers have not
    resident     in memory; together at most limit_bytes
    borrowed     resident and used by a running batch: never dropped before the batch ends

A batch gets the memory for all its adapters at once, or waits and holds none: so two batches never wait for each other.
Files are read without the lock. A name can be registered again at any time (hot swap): who borrows it from then on gets
the new folder's adapter, who has it keeps the old one, whose bytes count until then.

Read before this file: peft_format.
"""

import difflib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

NEAR_LIMIT = 1000  # of more names than these none is compared: 10,000 take a second


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a batch needs of an adapter: scaling · A (r, in) and B (out, r) of each layer that it touches, by name."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)


@dataclass(frozen=True, kw_only=True)
class CacheCounts:
    """What a cache did: hits and misses count the different adapters of each batch."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loaded_bytes: int = 0  # of all loads together
    resident_bytes: int = 0
    resident: int = 0
    registered: int = 0


class AdapterError(ValueError):
    """Adapters of a batch that cannot be had; `failures` says of each, by name, why. The others can be borrowed."""

    def __init__(self, failures: Mapping[str, Exception]):
        self.failures = dict(failures)
        reasons = [f"{name!r}: {error}" for name, error in self.failures.items()]
        super().__init__("; ".join(reasons))


class _Unknown(Exception):
    def __init__(self, names: Sequence[str], known: Sequence[str]):
        self.names, self.known = names, known


@dataclass(eq=False)
class _Entry:
    folder: Path
    size_bytes: int
    loaded: Future[Adapter] | None = None  # None where it is not resident; not yet done while one thread reads it
    borrowers: int = 0
    is_current: bool = True  # its name has not been registered again


@dataclass
class _Tally:
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    loaded_bytes: int = 0


@dataclass(frozen=True)
class _Loan:
    entries: dict[str, _Entry]
    futures: dict[str, Future[Adapter]]
    to_load: list[str] = field(default_factory=list)  # the names that this loan's thread has to read


class AdapterCache:
    """Adapters by name, of which at most `limit_bytes` are in memory. Every method may be called from any thread.

    `size_of` gives the bytes that a folder's adapter will take, or refuses it, from the config and the header alone;
    `read` gives the adapter. Both may raise ValueError and OSError.

    Raises:
        ValueError: if the limit is not positive.
    """

    def __init__(self, limit_bytes: int, *, size_of: Callable[[Path], int], read: Callable[[Path], Adapter]):
        if limit_bytes <= 0:
            raise ValueError(f"limit_bytes is {limit_bytes}: give the cache at least the bytes of one batch's adapters")
        self.limit_bytes = limit_bytes
        self._size_of, self._read = size_of, read
        self._changed = threading.Condition()  # guards all below
        self._entries: dict[str, _Entry] = {}
        self._resident: dict[_Entry, None] = {}  # the longest unused first
        self._resident_bytes = 0
        self._tally = _Tally()

    def register(self, name: str, folder: str | Path) -> None:
        """Let `name` be the adapter in a folder, also where it was another before; it is read when it is borrowed.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if the folder's adapter is refused, or is larger than the limit; the name is then as before.
        """
        entry = _Entry(Path(folder), self._size_of(Path(folder)))
        if entry.size_bytes > self.limit_bytes:
            raise ValueError(
                f"{folder} takes {entry.size_bytes:,} bytes, more than the limit of {self.limit_bytes:,} for all: "
                "raise limit_bytes"
            )
        with self._changed:
            before, self._entries[name] = self._entries.get(name), entry
            self._retire(before)

    def unregister(self, name: str) -> None:
        """Forget a name. Batches that have its adapter keep it.

        Raises:
            AdapterError: if there is none of that name.
        """
        with self._names_known():
            self._refuse_unknown([name])
            self._retire(self._entries.pop(name))

    @contextmanager
    def borrow(self, names: Collection[str]) -> Iterator[dict[str, Adapter]]:
        """Give these adapters for the length of a `with`; read those that are not resident.

        Where other batches hold the memory it waits for them. A thread that holds adapters of this cache already must
        not borrow more: it might wait for itself.

        Raises:
            AdapterError: if names are unknown, or files are gone, damaged or changed: all of them, each with its
                reason. The others of the batch are resident then, and other batches see nothing of it.
            ValueError: if these adapters together are larger than the limit.
        """
        loan = self._lend(dict.fromkeys(names))
        try:
            self._load(loan)
            errors = {name: future.exception() for name, future in loan.futures.items()}
            failures = {name: error for name, error in errors.items() if isinstance(error, Exception)}
            if failures:
                raise AdapterError(failures)
            yield {name: future.result() for name, future in loan.futures.items()}
        finally:
            self._give_back(loan)

    @property
    def counts(self) -> CacheCounts:
        """What happened until now, and what is resident."""
        with self._changed:
            return CacheCounts(
                **vars(self._tally),
                resident_bytes=self._resident_bytes,
                resident=len(self._resident),
                registered=len(self._entries),
            )

    def _lend(self, names: Collection[str]) -> _Loan:
        """Reserve the memory of all these adapters, and mark them as borrowed: all or, while there is no room, none."""
        with self._names_known():
            while True:
                self._refuse_unknown(names)
                entries = {name: self._entries[name] for name in names}
                missing = [name for name, entry in entries.items() if entry.loaded is None]
                needed = sum(entry.size_bytes for entry in entries.values())
                if needed > self.limit_bytes:
                    raise ValueError(
                        f"this batch's {len(entries)} adapters take {needed:,} bytes, more than the limit of "
                        f"{self.limit_bytes:,}: raise limit_bytes, or take fewer different adapters at once"
                    )
                if self._make_room(sum(entries[name].size_bytes for name in missing), entries.values()):
                    break
                self._changed.wait()
            for name in missing:
                entries[name].loaded = Future()
                self._resident_bytes += entries[name].size_bytes
            for entry in entries.values():
                entry.borrowers += 1
                self._resident.pop(entry, None)
                self._resident[entry] = None  # last: the latest used
            self._tally.misses += len(missing)
            self._tally.hits += len(entries) - len(missing)
            return _Loan(entries, {name: entry.loaded for name, entry in entries.items() if entry.loaded}, missing)

    def _make_room(self, size_bytes: int, keep: Collection[_Entry]) -> bool:
        """Drop the longest unused adapters until so many bytes are free; nothing, where that is not enough."""
        idle = [entry for entry in self._resident if entry.borrowers == 0 and entry not in keep]
        free = self.limit_bytes - self._resident_bytes
        if free + sum(entry.size_bytes for entry in idle) < size_bytes:
            return False
        for entry in idle:
            if self._resident_bytes + size_bytes <= self.limit_bytes:
                break
            self._drop(entry)
            self._tally.evictions += 1
        return True

    def _load(self, loan: _Loan) -> None:
        try:
            for name in loan.to_load:
                self._load_one(loan.entries[name], loan.futures[name])
        finally:  # where the thread was interrupted, nobody may wait for the rest of its files
            for name in loan.to_load:
                if not loan.futures[name].done():
                    self._fail(loan.entries[name], loan.futures[name], RuntimeError("its loading was interrupted"))

    def _load_one(self, entry: _Entry, future: Future[Adapter]) -> None:
        try:
            adapter = self._read(entry.folder)
            if adapter.size_bytes != entry.size_bytes:
                raise ValueError(
                    f"{entry.folder} has changed since it was registered (it took {entry.size_bytes:,} bytes, now "
                    f"{adapter.size_bytes:,}): register it again"
                )
        except Exception as error:
            self._fail(entry, future, error)
            return
        with self._changed:
            self._tally.loaded_bytes += entry.size_bytes
        future.set_result(adapter)

    def _fail(self, entry: _Entry, future: Future[Adapter], error: Exception) -> None:
        with self._changed:
            self._drop(entry)
        future.set_exception(error)

    def _give_back(self, loan: _Loan) -> None:
        with self._changed:
            for entry in loan.entries.values():
                entry.borrowers -= 1
                if not entry.is_current:
                    self._retire(entry)
            self._changed.notify_all()

    def _retire(self, entry: _Entry | None) -> None:
        """Drop what no name stands for any more, as soon as nobody borrows it."""
        if entry is None:
            return
        entry.is_current = False
        if entry.borrowers == 0 and entry.loaded is not None:
            self._drop(entry)
        self._changed.notify_all()

    def _drop(self, entry: _Entry) -> None:
        del self._resident[entry]
        self._resident_bytes -= entry.size_bytes
        entry.loaded = None

    @contextmanager
    def _names_known(self) -> Iterator[None]:
        """Hold the lock. What is near an unknown name is looked for afterwards: it takes longer than all else here."""
        try:
            with self._changed:
                yield
        except _Unknown as error:
            raise AdapterError({name: LookupError(_hint(name, error.known)) for name in error.names}) from None

    def _refuse_unknown(self, names: Collection[str]) -> None:
        unknown = [name for name in names if name not in self._entries]
        if unknown:
            raise _Unknown(unknown, list(self._entries))


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3) if len(known) <= NEAR_LIMIT else []
    return f"no adapter of that name is registered ({len(known)} are){f'; near it: {near}' if near else ''}"
