"""Model folders: written whole or not at all, and read back as what they were."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_decoder import tiny_config

from minilora.llm import Decoder, load_model, save
from minilora.llm.save import save_model

CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "something_else": [1, 2],
}  # fmt: skip
FILES = {
    "tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}),
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "do what you like",
    "minilora.json": "{}",
    "pytorch_model.bin": "a pickle",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder without weights."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in (FILES | {"config.json": json.dumps(CONFIG)}).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in Decoder(tiny_config()).state_dict().items()}


def write_config(source: Path, **changes: object) -> None:
    (source / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
def test_what_is_written_is_read_back_in_one_file_or_in_several(source, weights, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(save, "SHARD_BYTES", shard_bytes)
    out = tmp_path / "new" / "out"
    save_model(out, source, weights.items(), lambda: "a card")
    model, tokenizer = load_model(out)

    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.encode("ab") == [0, 1]
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        total = sum(w.nbytes for w in weights.values())
        n = len(files)
        assert n == len(weights) if shard_bytes == 1 else 1 < n < len(weights)
        assert files == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": total}
        each = [sum(w.nbytes for w in load_file(out / name).values()) for name in files]
        assert max(each) <= max(shard_bytes, *(w.nbytes for w in weights.values()))


def test_the_small_files_go_along_and_nothing_else_does(source, weights, tmp_path):
    save_model(tmp_path / "out", source, weights.items(), lambda: "a card")
    out = {path.name: path for path in (tmp_path / "out").iterdir()}

    assert out.keys() == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"),
        *("config.json", "model.safetensors", "README.md"),
    }
    assert out["LICENSE"].read_text() == FILES["LICENSE"]
    assert out["README.md"].read_text() == "a card"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in out.values()} == {0o644}


@pytest.mark.parametrize(
    ("said", "says"),
    [({}, {"torch_dtype"}), ({"dtype": "float32"}, {"dtype"}), ({"dtype": "x", "torch_dtype": "y"}, None)],
)
def test_the_config_says_the_dtype_where_it_said_one_before(source, weights, tmp_path, said, says):
    write_config(source, **said)
    save_model(tmp_path / "out", source, ((n, w.bfloat16()) for n, w in weights.items()), lambda: "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())

    keys = says or {"dtype", "torch_dtype"}
    assert config == CONFIG | dict.fromkeys(keys, "bfloat16")


@pytest.mark.parametrize("has_head", [False, True])
def test_a_head_that_comes_with_a_weight_of_its_own_is_not_tied(source, weights, tmp_path, has_head):
    write_config(source, tie_word_embeddings=True)
    kept = {name: w for name, w in weights.items() if has_head or name != "lm_head.weight"}
    save_model(tmp_path / "out", source, kept.items(), lambda: "")
    model, _ = load_model(tmp_path / "out")

    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not has_head
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not has_head


def test_nothing_is_overwritten(source, weights, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("taken", "file"):
        with pytest.raises(FileExistsError, match="is there already, and nothing is overwritten"):
            save_model(tmp_path / name, source, weights.items(), lambda: "")
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", source, weights.items(), lambda: "")

    assert (tmp_path / "taken" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_folder_is_there_whole_or_not_at_all(source, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 1)

    def breaks_off():
        yield from list(weights.items())[:5]
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        save_model(tmp_path / "out", source, breaks_off(), lambda: "")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_shard_is_written_as_soon_as_it_is_full(source, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 100)
    alive = []

    def made():
        for i in range(6):
            w = torch.zeros(20)
            alive.append(len(list(tmp_path.glob(".out-*/*.safetensors"))))
            yield f"{i}", w

    save_model(tmp_path / "out", source, made(), lambda: "")
    assert alive == [0, 0, 1, 2, 3, 4]
