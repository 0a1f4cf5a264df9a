"""write_whole: all files or none, and nothing left behind."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file

from minilora.files import is_unfinished, remove_unfinished_in, whole_file, with_sorted_metadata, write_whole


def test_files_are_written_with_their_folders(tmp_path):
    write_whole({tmp_path / "new" / "a": b"one", tmp_path / "b": b"two"})

    assert (tmp_path / "new" / "a").read_bytes() == b"one"
    assert (tmp_path / "b").read_bytes() == b"two"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_who_may_read_them_is_what_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_whole({tmp_path / "a": b""})
        with whole_file(tmp_path / "b") as path:
            save_file({"x": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o666 & ~umask] * 2


def test_where_the_second_cannot_be_written_the_first_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    synced = []

    def disk_full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)  # where many file systems first say so
    with pytest.raises(OSError, match="no space left"):
        write_whole({tmp_path / "a": b"new", tmp_path / "b": b"new"})

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file in it"):
        write_whole({tmp_path: b""})


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path, texts = Path(tmp_path / "a"), [bytes([n]) * 100_000 for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: write_whole({path: text}), texts * 10))

    assert path.read_bytes() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half of the ne")
        raise RuntimeError

    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    kept = ["a", "b", ".gitignore", ".a-123456789", "a-12345678", ".-12345678", ".a-abcd_efg", ".a-1234567"]
    for name in [*kept, ".a-12345678", ".ab.c-0123abcd"]:
        (tmp_path / name).touch()
    remove_unfinished_in(tmp_path)
    remove_unfinished_in(tmp_path / "nowhere")

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_the_names_that_are_written_under_are_those_that_are_removed(tmp_path):
    with whole_file(tmp_path / "a.b-c") as temporary:
        assert is_unfinished(temporary) and not is_unfinished(tmp_path / "a.b-c")
        remove_unfinished_in(tmp_path)
        assert not temporary.exists()
        temporary.touch()


def test_the_same_tensors_and_metadata_give_the_same_bytes():
    tensors = {"é": torch.arange(3.0), "b": torch.ones(2, 2)}
    names = [f"name {n}" for n in range(20)]
    files = {with_sorted_metadata(save(tensors, dict.fromkeys(names, "ü"))) for _ in range(5)}
    (file,) = files

    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(file).items())
    assert file.index(b"name 0") < file.index(b"name 10") < file.index(b"name 2")
