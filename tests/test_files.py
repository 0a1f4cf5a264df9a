"""whole_file and write_whole: all files or none, and nothing left behind."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minilora.files import whole_file, write_whole


def test_files_are_written_with_their_folders(tmp_path):
    write_whole({tmp_path / "new" / "a": b"one", tmp_path / "b": b"two"})

    assert (tmp_path / "new" / "a").read_bytes() == b"one"
    assert (tmp_path / "b").read_bytes() == b"two"
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o644


def test_where_the_second_cannot_be_written_the_first_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    made, real = [], tempfile.NamedTemporaryFile

    def disk_full(**settings):
        made.append(settings)
        if len(made) == 2:
            raise OSError("no space left on device")
        return real(**settings)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", disk_full)
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


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half-way"), whole_file(tmp_path / "a") as unfinished:
        unfinished.write_bytes(b"ne")
        raise RuntimeError("half-way")

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
