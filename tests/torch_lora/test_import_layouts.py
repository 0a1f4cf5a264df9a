"""mlx-lm, loralib and LLMs-from-scratch: converted to PEFT's layout, with the values of their own formulas."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.torch_lora import load_adapter
from minilora.torch_lora.import_layouts import FROM_SCRATCH, LORALIB, MLX, convert

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(5))
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
R, IN, OUT = 3, 6, 4


class Model(nn.Module):
    """Two layers of one name in a nest, so that names matter."""

    def __init__(self):
        super().__init__()
        layers = [nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(IN, OUT)})}) for _ in range(2)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers), "embed_tokens": nn.Embedding(9, IN)})


def drawn(shape: tuple[int, int]) -> Tensor:
    return torch.randn(*shape)


def assert_gives(model: nn.Module, expected: dict[str, Tensor], folder: Path) -> None:
    """To 1e-6: float32 sums of at most six products, in another order. (tests/compat asks PEFT as well.)"""
    load_adapter(model, folder)
    for name, y in expected.items():
        torch.testing.assert_close(model.get_submodule(name)(X), y, rtol=1e-6, atol=1e-6)


def write_mlx(folder: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora", "num_layers": 2, "model": "some/model",
        "lora_parameters": {"rank": R, "dropout": 0.0, "scale": 7.3, "keys": ["self_attn.q_proj"]},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def mlx_tensors() -> dict[str, Tensor]:
    a = {f"{name}.lora_a": drawn((IN, R)) for name in NAMES}
    return a | {f"{name}.lora_b": drawn((R, OUT)) for name in NAMES}


def test_mlx_lm_keeps_its_values(tmp_path):
    model, tensors, scale = Model(), mlx_tensors(), 7.3
    expected = {
        name: model.get_submodule(name)(X) + scale * ((X @ tensors[f"{name}.lora_a"]) @ tensors[f"{name}.lora_b"])
        for name in NAMES
    }

    assert convert(write_mlx(tmp_path / "mlx", tensors), tmp_path / "out") is MLX
    assert_gives(model, expected, tmp_path / "out")


def test_loralib_keeps_its_values_of_linear_layers_and_embeddings(tmp_path):
    model, alpha = Model(), 5.0
    tensors = {f"{name}.lora_A": drawn((R, IN)) for name in NAMES} | {
        f"{name}.lora_B": drawn((OUT, R)) for name in NAMES
    }
    tensors |= {"model.embed_tokens.lora_A": drawn((2, 9)), "model.embed_tokens.lora_B": drawn((IN, 2))}
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = {
        name: model.get_submodule(name)(X)
        + (X @ tensors[f"{name}.lora_A"].T @ tensors[f"{name}.lora_B"].T) * (alpha / R)
        for name in NAMES
    }
    tokens = torch.tensor([[3, 8], [0, 3]])
    rows = tensors["model.embed_tokens.lora_A"].T[tokens] @ tensors["model.embed_tokens.lora_B"].T
    embedded = model.model["embed_tokens"](tokens) + rows * (alpha / 2)

    assert convert(tmp_path / "lora.safetensors", tmp_path / "out", alpha=alpha) is LORALIB
    load_adapter(model, tmp_path / "out")
    for name, y in expected.items():
        torch.testing.assert_close(model.get_submodule(name)(X), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.model["embed_tokens"](tokens), embedded, rtol=1e-6, atol=1e-6)


def test_llms_from_scratch_keeps_its_values(tmp_path):
    model, alpha = Model(), 16
    tensors = {f"{name}.lora.A": drawn((IN, R)) for name in NAMES} | {f"{n}.lora.B": drawn((R, OUT)) for n in NAMES}
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = {
        name: model.get_submodule(name)(X) + (alpha / R) * (X @ tensors[f"{name}.lora.A"] @ tensors[f"{name}.lora.B"])
        for name in NAMES
    }

    assert convert(tmp_path / "lora.safetensors", tmp_path / "out", alpha=alpha, base_name="some/base") is FROM_SCRATCH
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert_gives(model, expected, tmp_path / "out")


def test_ranks_may_differ_and_half_precision_becomes_float32_without_loss(tmp_path):
    tensors = {"a.lora_A": drawn((2, IN)).bfloat16(), "a.lora_B": drawn((OUT, 2)).bfloat16()}
    tensors |= {"b.lora_A": drawn((5, IN)).half(), "b.lora_B": drawn((OUT, 5)).half()}
    save_file(tensors, tmp_path / "lora.safetensors")
    convert(tmp_path / "lora.safetensors", tmp_path / "out", alpha=4)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    model = nn.ModuleDict({"a": nn.Linear(IN, OUT), "b": nn.Linear(IN, OUT)})
    load_adapter(model, tmp_path / "out")

    assert (model["a"].scaling, model["b"].scaling) == (2.0, 0.8)
    assert torch.equal(written["base_model.model.a.lora_A.weight"], tensors["a.lora_A"].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type = 'dora': 'lora' alone is converted"),
        ({"lora_parameters": {"rank": R}}, "an object with the numbers rank and scale is needed"),
        ({"lora_parameters": None}, "an object with the numbers rank and scale is needed"),
        ({"lora_parameters": {"rank": 9, "scale": 2.0}}, r"q_proj: its r is 3, the config says 9"),
        ({"lora_parameters": {"rank": R, "scale": -2.0}}, "alpha is -6.0: it multiplies the update"),
        ({"lora_parameters": {"rank": R, "scale": 2.0, "dropout": "x"}}, "dropout must be a number"),
    ],
)
def test_an_mlx_config_that_is_not_followed_is_refused(tmp_path, changes, message):
    folder = write_mlx(tmp_path / "mlx", mlx_tensors(), **changes)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD = {
    "loralib without alpha": (
        {"q.lora_A": (R, IN), "q.lora_B": (OUT, R)},
        None,
        "loralib stores no alpha: give the one",
    ),
    "from scratch without alpha": ({"q.lora.A": (IN, R), "q.lora.B": (R, OUT)}, None, "stores no alpha: give the one"),
    "alpha 0": ({"q.lora_A": (R, IN), "q.lora_B": (OUT, R)}, 0.0, "alpha is 0.0"),
    "MergedLinear": ({"q.lora_A": (2 * R, IN), "q.lora_B": (OUT, R)}, 4.0, "no r in common; loralib's MergedLinear"),
    "Conv2d": (
        {"a.q.lora_A": (R, IN), "a.q.lora_B": (OUT, R), "a.conv1.lora_A": (2 * R, IN), "a.conv1.lora_B": (OUT, 2 * R)},
        4.0,
        r"from loralib:\n  a.conv1: a convolution by its name: .*leave it out$",
    ),
    "one alone": ({"q.lora_A": (R, IN)}, 4.0, "q: has one of .lora_A and .lora_B alone"),
    "more tensors": (
        {"q.lora_A": (R, IN), "q.lora_B": (OUT, R), "q.weight": (OUT, IN)},
        4.0,
        "q.weight: not a matrix of loralib's LoRA; leave it out",
    ),
    "two layouts": ({"q.lora_A": (R, IN), "q.lora.A": (IN, R)}, 4.0, "of no known layout"),
    "no layout": (
        {"q.weight": (R, IN)},
        4.0,
        "of no known layout: its tensors are q.weight, …; names that are known end in",
    ),
    "empty": ({}, 4.0, "its tensors are nothing"),
    "no name": ({".lora_A": (R, IN), ".lora_B": (OUT, R)}, 4.0, "it has no name"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_converted_is_refused_with_what_is_missing(tmp_path, case):
    shapes, alpha, message = case
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "lora.safetensors", tmp_path / "out", alpha=alpha)
    assert not (tmp_path / "out").exists()


def test_other_shapes_and_values_are_refused_together(tmp_path):
    tensors = mlx_tensors() | {"model.embed_tokens.lora_a": drawn((9, R)), "model.embed_tokens.lora_b": drawn((R, IN))}
    tensors |= {"experts.lora_a": torch.zeros(2, R, IN), "experts.lora_b": torch.zeros(2, OUT, R)}
    tensors[f"{NAMES[0]}.lora_a"][0, 0] = float("nan")
    with pytest.raises(ValueError) as error:
        convert(write_mlx(tmp_path / "mlx", tensors), tmp_path / "out")
    lines = str(error.value).splitlines()[1:]

    assert [line.split(": ")[0].strip() for line in sorted(lines)] == ["experts", "model.embed_tokens", NAMES[0]]


def test_pefts_own_folder_pickles_and_missing_files_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapters.safetensors"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"lora.pt is no safetensors file, and nothing else is opened"):
        convert(tmp_path / "lora.pt", tmp_path / "out", alpha=1)
    save_file(mlx_tensors(), tmp_path / "adapters.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config.json"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="that is PEFT's layout already"):
        convert(tmp_path, tmp_path / "out")


def test_alpha_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mlx-lm stores scale = alpha / r: leave it out"):
        convert(write_mlx(tmp_path / "mlx", mlx_tensors()), tmp_path / "out", alpha=4)
