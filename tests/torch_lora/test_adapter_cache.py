"""The cache: never above its limit, never without what a batch holds, the same under many threads."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from minilora.torch_lora.adapter_cache import Adapter, AdapterCache, AdapterError

SIZE = 80  # bytes of each adapter made here


def adapter_of(value: float, numbers: int = 10) -> Adapter:
    return Adapter({"layer": (torch.full((1, numbers), float(value)), torch.full((numbers, 1), float(value)))})


class Disk:
    """Folders that hold one number each, and how often each was read."""

    def __init__(self, **values: float):
        self.values = {Path(name): value for name, value in values.items()}
        self.reads: list[str] = []
        self.sizes: dict[Path, int] = {}

    def size_of(self, folder: Path) -> int:
        return SIZE

    def read(self, folder: Path) -> Adapter:
        self.reads.append(folder.name)
        if folder not in self.values:
            raise FileNotFoundError(f"there is no {folder}")
        return adapter_of(self.values[folder], self.sizes.get(folder, 10))


def cache_for(n: int, **values: float) -> tuple[AdapterCache, Disk]:
    """A cache with room for n adapters, and what it reads from; all are registered."""
    disk = Disk(**values)
    cache = AdapterCache(n * SIZE, size_of=disk.size_of, read=disk.read)
    for name in values:
        cache.register(name, name)
    return cache, disk


def value_of(adapter: Adapter) -> float:
    return adapter.pairs["layer"][0][0, 0].item()


def use(cache: AdapterCache, *names: str) -> list[float]:
    with cache.borrow(names) as adapters:
        return [value_of(adapters[name]) for name in names]


def test_registering_reads_no_adapter_and_borrowing_reads_it_once():
    cache, disk = cache_for(2, a=1, b=2)
    assert disk.reads == []

    assert use(cache, "a", "b") == [1, 2]
    assert use(cache, "b") == [2]

    assert disk.reads == ["a", "b"]
    assert (cache.counts.hits, cache.counts.misses, cache.counts.evictions) == (1, 2, 0)
    assert cache.counts.resident_bytes == 2 * SIZE
    assert cache.counts.loaded_bytes == 2 * SIZE


def test_the_longest_unused_adapter_is_dropped_first():
    cache, disk = cache_for(2, a=1, b=2, c=3)
    for name in ("a", "b", "a", "c", "a", "b"):  # c drops b, not a; then b drops c
        use(cache, name)

    assert disk.reads == ["a", "b", "c", "b"]
    assert cache.counts.evictions == 2


def test_only_as_many_are_dropped_as_the_new_ones_need():
    cache, disk = cache_for(3, a=1, b=2, c=3, d=4)
    use(cache, "a", "b", "c")
    use(cache, "d")
    disk.reads.clear()

    use(cache, "b", "c")

    assert disk.reads == []


def test_what_a_batch_holds_is_not_dropped_and_another_batch_waits_for_it():
    cache, disk = cache_for(2, a=1, b=2, c=3)
    got: list[float] = []
    waiting = threading.Thread(target=lambda: got.extend(use(cache, "b", "c")))
    with cache.borrow(["a"]) as held:
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()  # two of 80 bytes beside the one that is held are more than 160
        assert disk.reads == ["a"]
        assert value_of(held["a"]) == 1
    waiting.join(10)

    assert got == [2, 3]


def test_an_adapter_in_use_survives_others_coming_and_going():
    cache, disk = cache_for(2, a=1, b=2, c=3)
    with cache.borrow(["a"]):
        threads = [threading.Thread(target=use, args=(cache, name)) for name in ("b", "c")]
        for thread in threads:
            thread.start()
            thread.join(10)
    use(cache, "a")

    assert disk.reads == ["a", "b", "c"]


def test_a_batch_larger_than_the_limit_is_refused():
    cache, disk = cache_for(2, a=1, b=2, c=3)

    with pytest.raises(ValueError, match=r"3 adapters take 240 bytes, more than the limit of 160: raise limit_bytes"):
        use(cache, "a", "b", "c")
    assert disk.reads == []


def test_one_adapter_larger_than_the_limit_is_refused_when_it_is_registered():
    cache, _ = cache_for(1, a=1)
    cache._size_of = lambda folder: SIZE + 1

    with pytest.raises(ValueError, match="takes 81 bytes, more than the limit of 80"):
        cache.register("a", "other")
    assert use(cache, "a") == [1]


def test_a_name_registered_again_is_the_new_adapter_for_the_next_batch_and_the_old_for_the_running():
    cache, disk = cache_for(2, a=1, a2=5)
    with cache.borrow(["a"]) as held:
        cache.register("a", "a2")
        assert value_of(held["a"]) == 1
        assert cache.counts.resident_bytes == SIZE  # the old one counts while it is used
        swapped: list[float] = []
        thread = threading.Thread(target=lambda: swapped.extend(use(cache, "a")))
        thread.start()
        thread.join(10)
        assert swapped == [5]
        assert cache.counts.resident_bytes == 2 * SIZE
    assert cache.counts.resident_bytes == SIZE
    assert use(cache, "a") == [5]
    assert disk.reads == ["a", "a2"]


def test_an_idle_adapter_leaves_memory_when_its_name_is_registered_again_or_forgotten():
    cache, _ = cache_for(2, a=1, b=2)
    use(cache, "a", "b")

    cache.register("a", "b")
    assert cache.counts.resident_bytes == SIZE
    cache.unregister("b")

    assert cache.counts.resident_bytes == 0
    assert cache.counts.registered == 1
    with pytest.raises(AdapterError, match=r"'b': .*no adapter of that name"):
        cache.unregister("b")


def test_a_file_that_vanished_fails_its_own_request_alone():
    cache, disk = cache_for(3, a=1, b=2, c=3)
    del disk.values[Path("b")]

    with pytest.raises(AdapterError, match="'b': there is no b") as caught:
        use(cache, "a", "b", "c")
    assert list(caught.value.failures) == ["b"]
    assert isinstance(caught.value.failures["b"], FileNotFoundError)
    assert cache.counts.resident_bytes == 2 * SIZE
    disk.reads.clear()
    assert use(cache, "a", "c") == [1, 3]
    assert disk.reads == []

    disk.values[Path("b")] = 2  # it is back: the failure was not kept
    assert use(cache, "b") == [2]


def test_a_file_that_changed_its_size_since_it_was_registered_is_refused():
    cache, disk = cache_for(1, a=1)
    disk.sizes[Path("a")] = 11

    with pytest.raises(AdapterError, match=r"has changed since it was registered .*took 80 bytes, now 88"):
        use(cache, "a")
    assert cache.counts.resident_bytes == 0


def test_unknown_names_are_named_all_at_once_with_those_that_are_near():
    cache, _ = cache_for(2, french=1, german=2)

    with pytest.raises(AdapterError, match=r"^'frensh': no adapter of .*near it: \['french'\]; 'x': no") as caught:
        use(cache, "frensh", "german", "x")
    assert list(caught.value.failures) == ["frensh", "x"]
    assert str(caught.value.failures["x"]) == "no adapter of that name is registered (2 are)"


def test_a_name_is_compared_with_the_others_when_the_lock_is_free_again(monkeypatch):
    cache, _ = cache_for(1, abc=1)
    free = []

    def near(*args, **kwargs):
        other = threading.Thread(target=lambda: free.append(cache.counts.registered))
        other.start()
        other.join(2)
        return ["abc"]

    monkeypatch.setattr("minilora.torch_lora.adapter_cache.difflib.get_close_matches", near)
    with pytest.raises(AdapterError, match="near it"):
        use(cache, "abd")
    assert free == [1]


def test_files_are_read_without_the_lock():
    cache, disk = cache_for(2, a=1, b=2)
    use(cache, "a")
    meanwhile: list[list[float]] = []
    read = disk.read

    def slow(folder: Path) -> Adapter:
        other = threading.Thread(target=lambda: meanwhile.append(use(cache, "a")))
        other.start()
        other.join(2)
        return read(folder)

    cache._read = slow
    assert use(cache, "b") == [2]
    assert meanwhile == [[1]]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_holds_nothing_is_refused(limit):
    with pytest.raises(ValueError, match="limit_bytes"):
        AdapterCache(limit, size_of=lambda folder: 1, read=lambda folder: adapter_of(1))


def test_two_batches_that_miss_the_same_adapter_read_it_once():
    cache, disk = cache_for(2, a=1)
    read = disk.read

    def slowly(folder: Path) -> Adapter:
        time.sleep(0.1)
        return read(folder)

    cache._read = slowly
    threads = [threading.Thread(target=use, args=(cache, "a")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert disk.reads == ["a"]


def test_an_interrupted_load_leaves_nobody_waiting():
    cache, _ = cache_for(2, a=1, b=2)
    read, cache._read = cache._read, _interrupt

    with pytest.raises(KeyboardInterrupt):
        use(cache, "a", "b")
    cache._read = read

    assert cache.counts.resident_bytes == 0
    assert use(cache, "a", "b") == [1, 2]


def _interrupt(folder: Path) -> Adapter:
    raise KeyboardInterrupt


def test_many_threads_see_right_adapters_never_more_than_the_limit_and_nothing_is_left_behind():
    names = {f"n{number}": number for number in range(12)}
    cache, disk = cache_for(5, **names)
    disk.values |= {Path(f"n{number}x100"): 100 * number for number in range(12)}
    wrong: list[object] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(150):
                chosen = draw.sample(sorted(names), draw.randint(1, 3))
                with cache.borrow(chosen) as adapters:
                    for name, adapter in adapters.items():
                        if value_of(adapter) not in (names[name], 100 * names[name]):
                            wrong.append((name, value_of(adapter)))
                    if cache.counts.resident_bytes > cache.limit_bytes:
                        wrong.append(cache.counts)
                    time.sleep(0)
                if draw.random() < 0.2:
                    name = draw.choice(sorted(names))
                    cache.register(name, f"{name}{draw.choice(['', 'x100'])}")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    assert wrong == []
    resident = cache.counts.resident_bytes
    assert resident == SIZE * cache.counts.resident <= cache.limit_bytes
    assert all(entry.borrowers == 0 and entry.is_current for entry in cache._resident)
    assert cache.counts.evictions > 0
