"""The config as a file: JSON that is none, keys that are there twice, layers described. (More: test_peft_format.)"""

import json
from dataclasses import replace

import pytest

from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.peft_config import config_of, read_config, read_json_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": NaN}', "NaN is not a number in JSON"),
        ('{"lora_alpha": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"r": 8, "r": 4}', "it names 'r' twice"),
        ('{"rank_pattern": {"q": 8, "q": 4}}', "it names 'q' twice"),
        ('{"r": ' + "1" * 5000 + "}", "not JSON .*4300"),
        ('{"a": ' * 100_000, "not JSON"),
    ],
)
def test_what_json_does_not_allow_is_refused(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_json_object(tmp_path / "c.json")
    assert type(error.value) is ValueError
    assert str(error.value).startswith(str(tmp_path))


def test_a_folder_in_place_of_a_config_is_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no "):
        read_json_object(tmp_path)


def test_a_value_of_any_size_makes_an_error_of_a_few_lines(tmp_path):
    (tmp_path / "c.json").write_text('{"bias": ' + "[" * 300 + "]" * 300 + ', "x": "' + "y" * 100_000 + '"}')
    with pytest.raises(ValueError, match=r"bias = \[\[") as error:
        read_config(tmp_path / "c.json")
    assert len(str(error.value)) < 1_000


def test_settings_of_a_layer_are_those_of_the_first_pattern_that_hits(tmp_path):
    (tmp_path / "c.json").write_text(
        '{"r": 8, "lora_alpha": 16, "use_rslora": true, "rank_pattern": {"v": 4}, "alpha_pattern": {"a.v": 3, "v": 5}}'
    )
    config = read_config(tmp_path / "c.json")
    usual = LoRAConfig(r=8, alpha=16, use_rslora=True)

    assert config.settings_of("a.q") == usual
    assert config.settings_of("a.v") == replace(usual, r=4, alpha=3)
    assert config.settings_of("b.v") == replace(usual, r=4, alpha=5)
    assert config.settings_of("b.v").scaling == 2.5
    assert config.idle_patterns({"b.v": None}) == ["a.v"]


def test_layers_described_and_read_again_are_the_same(tmp_path):
    layers = {
        "a.q": LoRAConfig(r=8, alpha=4), "b.q": LoRAConfig(r=2, alpha=4), "a.v": LoRAConfig(r=8, alpha=1),
        "b.v": LoRAConfig(r=8, alpha=1),
    }  # fmt: skip
    written = config_of(layers, ["q", "v"])
    (tmp_path / "c.json").write_text(json.dumps(written, sort_keys=True))
    config = read_config(tmp_path / "c.json")

    assert {name: config.settings_of(name) for name in layers} == layers
    assert written["rank_pattern"] == {"b.q": 2}
    assert "use_rslora" not in written
