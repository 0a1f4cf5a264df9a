"""Adapters as files: strict both ways, refused with the reason, never half-written. (tests/compat has PEFT itself.)"""

import json
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRALinear, inject, load_adapter, peft_files, remove, save_adapter
from minilora.torch_lora.peft_config import config_sha256
from minilora.torch_lora.peft_files import base_form, read_tensors, write_adapter


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.v_proj(self.q_proj(x)))


def adapted(**settings: object) -> Model:
    model = Model()
    inject(model, ["q_proj", "v_proj"], lambda base: LoRALinear(base, **({"r": 2, "alpha": 4} | settings)))
    for layer in (model.q_proj, model.v_proj):
        nn.init.normal_(layer.B)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    """As if another program had written the folder: its tensors name no config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    edit_tensors(folder, lambda tensors: None)


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


Q_A = "base_model.model.q_proj.lora_A.weight"
Q_B = "base_model.model.q_proj.lora_B.weight"


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha": 7.5, "r": 3, "dropout": 0.25}])
def test_a_round_trip_gives_the_same_model(tmp_path, settings):
    model, bare = adapted(**settings), Model()
    save_adapter(model, tmp_path)
    remove_later = {k: v for k, v in model.state_dict().items() if "A" not in k.split(".") and "B" not in k.split(".")}
    bare.load_state_dict({k.replace(".base.", "."): v for k, v in remove_later.items()})
    report = load_adapter(bare, tmp_path)
    x = torch.randn(3, 8)

    assert torch.equal(bare.eval()(x), model.eval()(x))
    assert report.hits == {"q_proj": ["q_proj"], "v_proj": ["v_proj"]}
    assert bare.q_proj.dropout == model.q_proj.dropout
    assert {n for n, p in bare.named_parameters() if p.requires_grad} == {
        f"{layer}.{matrix}" for layer in ("q_proj", "v_proj") for matrix in "AB"
    }


def test_the_files_are_those_of_peft(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()

    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert names == {f"base_model.model.{m}_proj.lora_{x}.weight" for m in "qv" for x in "AB"}
    assert metadata == {"format": "pt", "config_sha256": config_sha256(config)}


def test_whole_names_are_written_where_the_last_parts_hit_more(tmp_path):
    model = nn.ModuleDict({"a": Model(), "b": Model()})
    inject(model, "a.q_proj", lambda base: LoRALinear(base, r=2, alpha=4))
    save_adapter(model, tmp_path)

    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a.q_proj"]


def test_an_adapter_loads_over_4_bits(saved):
    model = Model()
    load_adapter(model, saved, QLoRALinear)

    assert type(model.q_proj.base).__name__ == "NF4Linear"
    assert torch.equal(model.q_proj.A, load_file(saved / "adapter_model.safetensors")[Q_A])


def test_an_adapter_loads_into_the_layers_that_are_there(saved):
    model = adapted()
    load_adapter(model, saved)

    assert torch.equal(model.q_proj.B, load_file(saved / "adapter_model.safetensors")[Q_B])


def test_saving_over_an_adapter_leaves_no_temporary_file(saved):
    save_adapter(adapted(r=3), saved)

    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_file(saved / "adapter_model.safetensors")[Q_A].shape == (3, 8)


def test_saving_that_breaks_off_leaves_the_old_files_whole(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    synced = []

    def disk_full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:  # the tensors are written, the config is not
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(adapted(r=3), saved)

    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_layer_whose_name_ends_like_the_files_is_left_alone(tmp_path):
    def twice():
        return nn.ModuleDict({"lin": nn.Linear(6, 6), "block": nn.ModuleDict({"lin": nn.Linear(6, 6)})})

    model = twice()
    inject(model, re.compile("lin"), lambda base: LoRALinear(base, r=2, alpha=4))
    save_adapter(model, tmp_path)
    fresh = twice()
    load_adapter(fresh, tmp_path)

    assert isinstance(fresh["lin"], LoRALinear)
    assert type(fresh["block"]["lin"]) is nn.Linear


def test_a_merged_model_refuses_to_load(saved):
    model = adapted()
    model.q_proj.merge()
    with pytest.raises(ValueError, match=r"1 layers of the model are merged, the first is q_proj: .* unmerge"):
        load_adapter(model, saved)


@pytest.mark.parametrize("value", ["false", 1, []])
def test_use_rslora_is_true_or_false_and_nothing_like_it(saved, value):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": value}))
    with pytest.raises(ValueError, match=r"use_rslora = .*: true or false is needed"):
        load_adapter(Model(), saved)


def test_an_alpha_beyond_all_floats_is_refused(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10**400}))
    with pytest.raises(ValueError, match="positive and finite"):
        load_adapter(Model(), saved)


def test_another_base_is_warned_of(tmp_path):
    save_adapter(adapted(), tmp_path, base_name="some/base", base_sha256="a" * 64)

    with pytest.warns(UserWarning, match="trained on a base with SHA-256 aaaaaaaaaaaa…, this base has bbbbbbbbbbbb…"):
        load_adapter(Model(), tmp_path, base_sha256="b" * 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(Model(), tmp_path, base_sha256="a" * 64)
        load_adapter(Model(), tmp_path)


def test_how_the_base_was_stored_is_read_of_the_header_alone(tmp_path, monkeypatch):
    model = Model()
    inject(model, ["q_proj"], lambda base: QLoRALinear(base, r=2, alpha=4))
    save_adapter(model, tmp_path)

    @contextmanager
    def header_alone(path, framework):
        with safe_open(path, framework=framework) as file:
            yield SimpleNamespace(metadata=file.metadata)

    monkeypatch.setattr(peft_files, "safe_open", header_alone)
    assert base_form(tmp_path) == model.q_proj.base.stored_as
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged or cut short"):
        base_form(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        base_form(tmp_path)


# --- what does not fit: one error, all mismatches, and the model is as before


def test_all_mismatches_are_listed_at_once_and_nothing_is_changed(saved):
    def change(tensors):
        tensors["base_model.model.k_proj.lora_A.weight"] = torch.zeros(2, 8)
        tensors["base_model.model.q_proj.magnitude"] = torch.zeros(2)
        tensors[Q_A] = torch.zeros(2, 9)
        del tensors["base_model.model.v_proj.lora_B.weight"]

    edit_tensors(saved, change)
    model = Model()
    with pytest.raises(ValueError) as error:
        load_adapter(model, saved)

    assert str(error.value).splitlines() == [
        "this adapter does not fit the model:",
        "  base_model.model.k_proj.lora_A.weight: the model has no layer of that name and kind",
        "  base_model.model.q_proj.lora_A.weight: shape (2, 9), the model has (2, 8)",
        "  base_model.model.q_proj.magnitude: not the name of an adapter's tensor, "
        "nor of one that the config says is replaced",
        "  q_proj: has ['B'], ['A', 'B'] are needed",
        "  v_proj: has ['A'], ['A', 'B'] are needed",
    ]
    assert type(model.q_proj) is type(model.v_proj) is nn.Linear


def test_every_slot_of_the_model_must_be_filled(saved):
    model = adapted()
    inject(model, "out", lambda base: LoRALinear(base, r=2, alpha=4))

    with pytest.raises(ValueError, match="out: missing from the file"):
        load_adapter(model, saved)


def test_every_tensor_of_the_file_must_have_a_slot(saved):
    model = Model()
    inject(model, "q_proj", lambda base: LoRALinear(base, r=2, alpha=4))

    with pytest.raises(ValueError, match="v_proj: has no adapter in the model"):
        load_adapter(model, saved)


def test_layers_made_with_other_settings_are_refused(saved):
    with pytest.raises(ValueError, match=r"the file has \(r, alpha, use_rslora\) = \(2, 4, False\), but 2 layers"):
        load_adapter(adapted(alpha=8), saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_file_with_values_that_are_not_finite_is_refused(saved, bad):
    edit_tensors(saved, lambda tensors: tensors[Q_A].fill_(bad))

    with pytest.raises(ValueError, match=f"{Q_A}: not finite floats"):
        load_adapter(Model(), saved)


@pytest.mark.parametrize("shape", [(2, 8, 1), (2,), (0, 8, 2), ()])
def test_a_matrix_that_is_none_is_told_by_its_shape(saved, shape):
    edit_tensors(saved, lambda tensors: tensors.update({Q_A: torch.zeros(shape)}))

    with pytest.raises(ValueError, match=re.escape(f"{Q_A}: shape {shape}, the model has (2, 8)")):
        load_adapter(Model(), saved)


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_a_value_that_is_infinite_in_float32_is_refused(saved, value):
    edit_tensors(saved, lambda tensors: tensors.update({Q_A: torch.full((2, 8), value, dtype=torch.float64)}))

    with pytest.raises(ValueError, match=f"{Q_A}: not finite floats"):
        load_adapter(Model(), saved)


def test_an_empty_adapter_is_refused(saved):
    edit_tensors(saved, dict.clear)

    with pytest.raises(ValueError, match=r"does not fit the model:\n  it is empty"):
        load_adapter(Model(), saved)


@pytest.mark.parametrize("length", [0, 3, 8, 60, -1])
def test_a_truncated_file_is_named(saved, length):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged or cut short .*: fetch it again"):
        load_adapter(Model(), saved)


@pytest.mark.parametrize("text", ["", "{", '{"r": 2', "\xff\xfe", "[" * 100_000])
def test_a_damaged_config_is_named(saved, text):
    (saved / "adapter_config.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON .*: the file is damaged"):
        load_adapter(Model(), saved)


def test_a_config_that_is_no_object_is_refused(saved):
    (saved / "adapter_config.json").write_text("[1, 2]")

    with pytest.raises(ValueError, match="holds a JSON list, not the object that PEFT writes"):
        load_adapter(Model(), saved)


def test_a_config_of_absurd_size_is_not_read(saved):
    (saved / "adapter_config.json").write_text(" " * 1_000_001)

    with pytest.raises(ValueError, match="more than 1,000,000 bytes"):
        load_adapter(Model(), saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"q_proj: has \['A', 'B'\], \['A', 'B', 'm'\] are needed"),
        ({"rank_pattern": {"q_proj": 4}}, "q_proj.lora_A.weight: its r is 2, the config gives this layer 4"),
        ({"rank_pattern": {"q|v": 2}}, r"rank_pattern\['q\|v'\]: '\|' is not read here"),
        ({"rank_pattern": {"q_proj": 2.0}}, r"rank_pattern\['q_proj'\]: 2.0 is not a whole number"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: r is 0: it counts the rows of A"),
        ({"r": 2.0}, "r = 2.0: a whole number is needed"),
        ({"alpha_pattern": {"q_proj": "4"}}, r"alpha_pattern\['q_proj'\]: '4' is not a number"),
        ({"alpha_pattern": {"q_proj": -4}}, r"alpha_pattern\['q_proj'\]: alpha is -4: .* positive and finite"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern = \['q_proj'\]: an object of names and numbers is needed"),
        ({"rank_pattern": {f"p{i}": 2 for i in range(10_001)}}, "rank_pattern has 10,001 entries"),
        ({"modules_to_save": ["out"]}, "base_model.model.out.weight: missing from the file"),
        ({"modules_to_save": ["head"]}, r"modules_to_save = \['head'\]: no module's name ends so"),
        ({"modules_to_save": "out"}, "modules_to_save = 'out': a list of names is needed"),
        ({"modules_to_save": [""]}, r"modules_to_save = \[''\]: a list of names is needed"),
        ({"modules_to_save": ["out"], "ensure_weight_tying": True}, "ensure_weight_tying = True: it saves a module"),
        ({"bias": "all"}, "base_model.model.q_proj.base_layer.bias: missing from the file"),
        ({"bias": "some"}, r"bias = 'some': one of \('none', 'all', 'lora_only'\) is needed"),
        ({"bias": ["all"]}, r"bias = \['all'\]: one of"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3': this reader knows 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': it moves part of the base's weight"),
        ({"use_something_new": 1}, "use_something_new = 1: not a key this reader knows"),
        ({"lora_alpha": "16"}, "lora_alpha = '16': a number is needed"),
        ({"r": 0}, "r is 0: it counts the rows of A"),
        ({"r": "2"}, "r = '2': a number is needed"),
        ({"lora_dropout": 1.5}, "dropout is 1.5: it is a probability"),
    ],
)
def test_a_config_that_asks_for_more_than_plain_lora_is_refused_with_the_reason(saved, changes, message):
    edit_config(saved, **changes)

    with pytest.raises(ValueError, match=message):
        load_adapter(Model(), saved)


def test_all_refused_keys_are_named_at_once(saved):
    edit_config(saved, use_dora=1, bias="some", use_something_new=1)

    with pytest.raises(ValueError) as error:
        load_adapter(Model(), saved)
    assert len(str(error.value).splitlines()) == 4


def test_keys_at_their_defaults_are_accepted(saved):
    edit_config(saved, use_dora=False, rank_pattern={}, loftq_config={}, megatron_core="megatron.core", brand_new=None)
    load_adapter(Model(), saved)


def test_a_config_that_the_tensors_were_not_written_with_is_refused_whatever_it_says(saved, tmp_path_factory):
    """A process killed between the two renames leaves new tensors beside the old config: another alpha, in silence."""
    other = tmp_path_factory.mktemp("other")
    save_adapter(adapted(alpha=64), other)
    (saved / "adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    model = Model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"is not the config that .* was written with.*save the adapter again"):
        load_adapter(model, saved)
    assert dict(model.named_modules()) == before


def test_a_config_changed_by_hand_is_taken_after_what_the_error_says(saved):
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(ValueError, match=r"changed by hand: .*write_adapter\(folder, json.loads\(config_text\)"):
        load_adapter(Model(), saved)
    tensors, metadata = read_tensors(saved / "adapter_model.safetensors")
    write_adapter(saved, json.loads(path.read_text()), tensors, metadata | {"base_sha256": "1" * 64})
    model = Model()
    load_adapter(model, saved)

    assert model.q_proj.alpha == 8
    assert read_tensors(saved / "adapter_model.safetensors")[1]["base_sha256"] == "1" * 64  # the rest is kept


def test_a_config_that_says_the_same_in_other_words_is_the_same(saved):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text()) | {
        "base_model_name_or_path": "renamed",
        "use_dora": False,
        "rank_pattern": {},
    }
    path.write_text(json.dumps(dict(sorted(config.items(), reverse=True)), indent=7).replace("\n", "\r\n"))
    load_adapter(Model(), saved)


def test_a_missing_file_is_named_and_a_pickle_is_never_opened(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")

    with pytest.raises(FileNotFoundError, match=r"no .*adapter_model.safetensors; adapter_model.bin is a pickle"):
        load_adapter(Model(), saved)


def test_names_that_look_like_paths_or_patterns_are_only_names(saved):
    def change(tensors):
        tensors["base_model.model.../../q_proj.lora_A.weight"] = torch.zeros(2, 8)
        tensors["base_model.model.(.*)+.lora_A.weight"] = torch.zeros(2, 8)

    edit_tensors(saved, change)
    with pytest.raises(ValueError, match=r"\(\.\*\)\+\.lora_A\.weight: the model has no layer of that name"):
        load_adapter(Model(), saved)


def test_a_name_that_would_write_to_the_terminal_is_not_printed_as_it_is(saved):
    edit_tensors(
        saved, lambda tensors: tensors.update({"base_model.model.\x1b[2Jq_proj.lora_A.weight": torch.zeros(2, 8)})
    )
    with pytest.raises(ValueError, match=r"names a tensor 'base_model.model.\\x1b\[2J.*'") as caught:
        load_adapter(Model(), saved)
    assert "\x1b" not in str(caught.value)


def test_patterns_are_compared_with_each_layer_once(saved, monkeypatch):
    """There may be ten thousand of them."""
    asked = []
    monkeypatch.setattr(
        "minilora.torch_lora.peft_config.resolve", lambda patterns, name, default: asked.append(name) or default
    )
    load_adapter(Model(), saved)

    assert sorted(asked) == ["q_proj", "q_proj", "v_proj", "v_proj"]  # for r and for alpha


# --- what cannot be saved


def test_a_model_without_an_adapter_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="this model has no adapter to save"):
        save_adapter(Model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_with_nan_is_not_saved(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.q_proj.A[0, 0] = float("nan")

    with pytest.raises(ValueError, match=f"1 tensors of this adapter hold NaN or infinite values, the first is {Q_A}"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_layers_that_differ_in_use_rslora_cannot_be_saved_as_one(tmp_path):
    model = adapted()
    inject(model, "out", lambda base: LoRALinear(base, r=2, alpha=4, use_rslora=True))

    with pytest.raises(ValueError, match="differ in use_rslora: out has it, v_proj has not"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_removing_and_loading_again_gives_the_same_output(saved):
    model, x = Model(), torch.randn(3, 8)
    load_adapter(model, saved)
    first = model(x)
    remove(model)
    load_adapter(model, saved)

    assert torch.equal(model(x), first)
