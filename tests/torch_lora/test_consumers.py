"""Who takes an adapter: every rule of vLLM, llama.cpp and mlx-lm once kept and once broken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.torch_lora import LoRALinear, inject, lora_layer, save_adapter, train_biases, train_modules
from minilora.torch_lora.consumers import acceptance


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 6)
        self.q_proj, self.v_proj, self.c_attn = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 9, bias=False)


def saved(folder: Path, *, v: dict[str, object] | None = None, **settings: object) -> Path:
    """An adapter on q_proj and v_proj; `v` are settings of v_proj alone."""
    model = Model()
    common = {"r": 4, "alpha": 8} | settings
    inject(model, "q_proj", lambda base: LoRALinear(base, **common))
    inject(model, "v_proj", lambda base: LoRALinear(base, **(common | (v or {}))))
    save_adapter(model, folder, base_name="some/base")
    return folder


def edit(folder: Path, drop: str = "", **changes: object) -> Path:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    config.pop(drop, None)
    path.write_text(json.dumps(config))
    return folder


def add(folder: Path, name: str, shape: tuple[int, ...]) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{name}": torch.zeros(shape)}, path)
    return folder


def test_a_plain_adapter_is_accepted_by_vllm_and_llama_cpp(tmp_path):
    report = acceptance(saved(tmp_path))

    assert str(report).splitlines() == [
        "vLLM: accepts it",
        "llama.cpp: accepts it",
        "mlx-lm: refuses it",
        "  PEFT's layout: it looks for adapters.safetensors, and num_layers and lora_parameters in the config",
    ]
    assert [report[name].accepts for name in ("vLLM", "llama.cpp", "mlx-lm")] == [True, True, False]


@pytest.mark.parametrize(
    ("r", "flag"),
    [(16, ()), (17, ("--max-lora-rank 32 (an r is 17)",)), (257, ("--max-lora-rank 320 (an r is 257)",))],
)
def test_vllm_needs_a_flag_above_rank_16(tmp_path, r, flag):
    assert acceptance(saved(tmp_path, r=r))["vLLM"].needs == flag


def test_vllm_has_no_room_above_rank_512(tmp_path):
    assert acceptance(saved(tmp_path, r=513))["vLLM"].refuses == ("r = 513: --max-lora-rank goes up to 512",)


# what is done to the adapter; the words about vLLM and about llama.cpp (empty: nothing is said)
CASES = {
    "rsLoRA": (
        lambda f: saved(f, use_rslora=True),
        "",
        "use_rslora: the factor is alpha / r, one alpha, no rsLoRA, so 2 of 2 layers get another one: "
        "q_proj gets 2 instead of 4",
    ),
    "ranks": (
        lambda f: saved(f, v={"r": 2}),
        "rank_pattern: the factor is one alpha and one r for all layers, so 1 of 2 layers get another one: "
        "v_proj gets 2 instead of 4",
        "",
    ),
    "alphas": (
        lambda f: saved(f, v={"alpha": 2}), "alpha_pattern: .*v_proj gets 2 instead of 0.5", "alpha_pattern: .*v_pro",
    ),
    "ranks and alphas in proportion": (
        lambda f: saved(f, v={"r": 2, "alpha": 4}), "", "alpha_pattern: .* v_proj gets 4 instead of 2",
    ),
    "a pattern that is not followed": (
        lambda f: edit(saved(f), alpha_pattern={"q|v": 2}), "alpha_pattern: ignored, and of a form", "alpha_pattern",
    ),
    "DoRA": (
        lambda f: add(edit(saved(f), use_dora=True), "q_proj.lora_magnitude_vector", (6,)),
        "use_dora: DoRA's magnitudes are not known", "1 tensors are no LoRA matrices, the first is .*magnitude_vector",
    ),
    "no alpha": (lambda f: edit(saved(f), "lora_alpha"), "lora_alpha is missing", "lora_alpha is missing"),
    "no r": (lambda f: edit(saved(f), "r"), "r is missing from the config", ""),
    "no targets": (lambda f: edit(saved(f), "target_modules"), "target_modules is missing", ""),
    "targets as a pattern": (lambda f: edit(saved(f), target_modules=".*q"), "a version that reads target_modules", ""),
    "no base": (lambda f: edit(saved(f), base_model_name_or_path=None), "", "--base, a folder with the base model's"),
    "a copied embedding": (
        lambda f: add(saved(f), "embed_tokens.base_layer.weight", (9, 6)), "1 tensors are no LoRA matrices", "",
    ),
    "a norm": (
        lambda f: add(edit(saved(f), modules_to_save=["norm"]), "model.norm.weight", (6,)), "modules_to_save = ", "",
    ),
    "one strange name": (lambda f: add(saved(f), "x", (6,)), "1 tensors are no", "1 tensors are no LoRA matrices, .*x"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_refused_or_computed_differently_is_said(tmp_path, case):
    make, vllm, llama_cpp = case
    report = acceptance(make(tmp_path))
    for consumer, said in (("vLLM", vllm), ("llama.cpp", llama_cpp)):
        verdict = report[consumer]
        words = [*verdict.refuses, *verdict.differs, *verdict.needs]
        assert bool(words) == bool(said), words
        if said:
            with pytest.raises(ValueError, match=said):
                raise ValueError(str(verdict))


def test_biases_and_modules_are_refused_by_both(tmp_path):
    model = Model()
    inject(model, "q_proj", lambda base: LoRALinear(base, r=2, alpha=4))
    train_biases(model)
    train_modules(model, "lm_head")
    save_adapter(model, tmp_path)
    report = acceptance(tmp_path)

    assert report["vLLM"].refuses == (
        "modules_to_save = ['lm_head']: not supported",
        "bias = 'lora_only': not supported",
        "2 tensors are no LoRA matrices, the first is base_model.model.lm_head.weight",
    )
    assert report["llama.cpp"].refuses == report["vLLM"].refuses[2:]
    assert not report["vLLM"].accepts


def test_embeddings_heads_and_unusual_names_are_conditions(tmp_path):
    model = Model()
    inject(model, ["embed_tokens", "c_attn", "lm_head"], lambda base: lora_layer(base, r=2, alpha=4))
    save_adapter(model, tmp_path, base_name="some/base")
    report = acceptance(tmp_path)

    assert report["vLLM"].needs == (
        "the model lists embed_tokens in its embedding_modules",
        "the model has linear layers named ['c_attn']",
    )
    assert report["llama.cpp"].needs == (
        "a base whose output head is not tied to its embedding",
        "the model has linear layers named ['c_attn']",
    )
    assert report["vLLM"].accepts


def mlx(folder: Path, **parameters: object) -> Path:
    names = [f"model.layers.0.{name}.{x}" for name in ("self_attn.q_proj", "mlp.up_proj") for x in ("lora_a", "lora_b")]
    save_file({name: torch.zeros(2, 2) for name in names}, folder / "adapters.safetensors")
    config = {"num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0} | parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_mlx_lm_takes_its_own_layout_and_the_others_do_not(tmp_path):
    report = acceptance(mlx(tmp_path, keys=["self_attn.q_proj", "mlp.up_proj"]))

    assert report["mlx-lm"].accepts
    assert "torch_lora.import_layouts.convert makes PEFT's of it" in report["vLLM"].refuses[0]
    assert not report["llama.cpp"].accepts


def test_mlx_lm_leaves_out_layers_that_its_keys_do_not_name(tmp_path):
    verdict = acceptance(mlx(tmp_path))["mlx-lm"]

    assert verdict.differs == (
        "1 layers are left out, as keys does not name them: the first is model.layers.0.mlp.up_proj",
    )


def test_mlx_lm_needs_its_parameters(tmp_path):
    edit(mlx(tmp_path), "num_layers", lora_parameters={"rank": 2})
    assert acceptance(tmp_path)["mlx-lm"].refuses == (
        "num_layers is missing from the config",
        "lora_parameters: scale is missing",
        "lora_parameters: dropout is missing",
    )
    edit(tmp_path, "lora_parameters")
    assert "lora_parameters is missing from the config" in acceptance(tmp_path)["mlx-lm"].refuses


@pytest.mark.parametrize("value", [None, "x", [], {}, True, -1, 0, 10**400, 1e300, [[1]]])
@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "target_modules", "bias", "modules_to_save", "alpha_pattern", "rank_pattern", "use_dora",
            "use_rslora", "base_model_name_or_path", "lora_parameters"]
)  # fmt: skip
def test_a_config_of_wrong_types_gets_a_report_all_the_same(tmp_path, key, value):
    assert len(str(acceptance(edit(saved(tmp_path), **{key: value})))) < 3_000


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config.json"):
        acceptance(tmp_path)
