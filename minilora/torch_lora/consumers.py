"""Will vLLM, llama.cpp and mlx-lm take this adapter, and compute what PEFT computes? From its files alone.

    PEFT, ours     h = base(x) + scaling · (x Aᵀ) Bᵀ     scaling = alpha / r (rsLoRA: / √r), r and alpha per layer
    vLLM           one factor for all layers, from the config's r and alpha; knows rsLoRA, knows no patterns
    llama.cpp      alpha / r with each layer's own r, and one alpha; knows neither rsLoRA nor alpha_pattern
    mlx-lm         reads a layout of its own: torch_lora/import_layouts

What is said here was read in the sources of vLLM (lora/peft_helper, lora/utils, config/lora), llama.cpp
(convert_lora_to_gguf.py, llama-adapter) and mlx-lm (tuner/utils), 2026; none of them was run. Read before this file:
peft_config, peft_tensors.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.torch_lora.import_layouts import MLX, MLX_TENSOR_FILE
from minilora.torch_lora.peft_config import CONFIG_FILE, is_number, read_json_object
from minilora.torch_lora.peft_files import TENSOR_FILE, read_tensors
from minilora.torch_lora.peft_patterns import parse_pattern, resolve
from minilora.torch_lora.peft_tensors import EMBEDDING_SUFFIXES, LINEAR_SUFFIXES
from minilora.torch_lora.peft_whole import PREFIX

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
VLLM_DEFAULT_RANK = 16
MLX_DEFAULT_TARGETS = ("self_attn.q_proj", "self_attn.v_proj")  # of Llama, Qwen and most others
# Last parts of names that the Llama family has in all three; others depend on the model.
USUAL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Verdict:
    """What one consumer does with an adapter."""

    consumer: str
    refuses: tuple[str, ...] = ()  # reasons why it does not load
    differs: tuple[str, ...] = ()  # it loads, and computes something else, without a word
    needs: tuple[str, ...] = ()  # it loads if this is so

    @property
    def accepts(self) -> bool:
        """Whether it loads, given what it needs, and computes what PEFT computes."""
        return not self.refuses and not self.differs

    def __str__(self) -> str:
        outcome = (
            "refuses it" if self.refuses else "loads it, and computes something else" if self.differs else "accepts it"
        )
        reasons = [f"  {text}" for text in self.refuses + self.differs] + [f"  needs: {text}" for text in self.needs]
        return "\n".join([f"{self.consumer}: {outcome}", *reasons])


@dataclass(frozen=True)
class Acceptance:
    """The verdict of each consumer."""

    verdicts: tuple[Verdict, ...]

    def __getitem__(self, consumer: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.consumer == consumer)

    def __str__(self) -> str:
        return "\n".join(map(str, self.verdicts))


def acceptance(folder: str | Path) -> Acceptance:
    """Read an adapter's config and the names and shapes of its tensors, and say who takes it.

    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if a file is damaged.
    """
    folder = Path(folder)
    config = read_json_object(folder / CONFIG_FILE)
    mlx = not (folder / TENSOR_FILE).exists() and (folder / MLX_TENSOR_FILE).exists()
    tensors, _ = read_tensors(folder / (MLX_TENSOR_FILE if mlx else TENSOR_FILE))
    if mlx:
        reason = "mlx-lm's layout; torch_lora.import_layouts.convert makes PEFT's of it"
        return Acceptance((Verdict("vLLM", (reason,)), Verdict("llama.cpp", (reason,)), _mlx(config, tensors)))
    ours = "PEFT's layout: it looks for adapters.safetensors, and num_layers and lora_parameters in the config"
    return Acceptance((_vllm(config, tensors), _llama_cpp(config, tensors), Verdict("mlx-lm", (ours,))))


def _vllm(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Verdict:
    ranks = ranks_of(tensors)
    largest = max(ranks.values(), default=0)
    refuses = [f"{key} is missing from the config, and has no default" for key in _missing(config, "target_modules")]
    refuses += ["use_dora: DoRA's magnitudes are not known"] if config.get("use_dora") else []
    refuses += [_said(config, "modules_to_save")] if config.get("modules_to_save") else []
    refuses += [_said(config, "bias")] if config.get("bias", "none") != "none" else []
    refuses += _odd_names(tensors, lambda key: False)
    refuses += [f"r = {largest}: --max-lora-rank goes up to {VLLM_RANKS[-1]}"] if largest > VLLM_RANKS[-1] else []
    needs = [f"the model lists {n} in its embedding_modules" for n in sorted(_leaves(tensors, EMBEDDING_SUFFIXES))]
    needs += _unusual(tensors)
    flag = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    needs += [f"--max-lora-rank {flag} (an r is {largest})"] if flag and largest > VLLM_DEFAULT_RANK else []
    if isinstance(config.get("target_modules"), str):
        needs.append("a version that reads target_modules as a pattern")
    r, alpha, rslora = config.get("r"), config.get("lora_alpha"), bool(config.get("use_rslora"))
    differs = _other_factors(config, ranks, lambda _: factor(alpha, r, rslora), "one alpha and one r for all layers")
    return Verdict("vLLM", tuple(refuses), tuple(differs), tuple(needs))


def _llama_cpp(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Verdict:
    refuses = [f"{key} is missing from the config, and has no default" for key in _missing(config, "") if key != "r"]
    refuses += _odd_names(tensors, lambda key: "_layernorm" in key or ".norm" in key or ".base_layer.weight" in key)
    needs = [] if config.get("base_model_name_or_path") else ["--base, a folder with the base model's config"]
    needs += ["a base whose output head is not tied to its embedding"] if "lm_head" in _leaves(tensors) else []
    needs += _unusual(tensors)
    alpha, ranks = config.get("lora_alpha"), ranks_of(tensors)
    says = "alpha / r, one alpha, no rsLoRA"
    differs = _other_factors(config, ranks, lambda name: factor(alpha, ranks[name], False), says)
    return Verdict("llama.cpp", tuple(refuses), tuple(differs), tuple(needs))


def _mlx(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Verdict:
    parameters = config.get("lora_parameters")
    refuses = [] if is_number(config.get("num_layers")) else ["num_layers is missing from the config"]
    if not isinstance(parameters, dict):
        return Verdict("mlx-lm", (*refuses, "lora_parameters is missing from the config"))
    refuses += [f"lora_parameters: {key} is missing" for key in ("rank", "scale", "dropout") if key not in parameters]
    keys = parameters.get("keys") or MLX_DEFAULT_TARGETS
    targets = tuple(str(key) for key in keys) if isinstance(keys, list | tuple) else MLX_DEFAULT_TARGETS
    lost = sorted(
        {k.removesuffix(s) for k in tensors for s in MLX.suffixes if k.endswith(s)} - _ending(tensors, targets)
    )
    differs = [f"{len(lost)} layers are left out, as keys does not name them: the first is {lost[0]}"] if lost else []
    return Verdict("mlx-lm", tuple(refuses), tuple(differs))


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The r that each layer's A has."""
    ends = (LINEAR_SUFFIXES["A"], EMBEDDING_SUFFIXES["A"])
    return {
        key.removeprefix(PREFIX).removesuffix(end): len(tensor)
        for key, tensor in tensors.items()
        for end in ends
        if key.endswith(end) and tensor.ndim == 2 and len(tensor)
    }


def factor(alpha: Any, r: Any, use_rslora: bool) -> float | None:
    """The factor in front of B A; None where alpha or r is no number that makes one."""
    if not (is_number(alpha) and is_number(r) and r > 0):
        return None
    try:
        return alpha / (math.sqrt(r) if use_rslora else r)
    except OverflowError:
        return None


def _other_factors(
    config: Mapping[str, Any], ranks: Mapping[str, int], theirs: Callable[[str], float | None], says: str
) -> list[str]:
    """Where a consumer's factor is not PEFT's: how many layers, the first of them, and what the config asks for."""
    patterns = config.get("alpha_pattern")
    try:
        alphas = {
            parse_pattern(text): value for text, value in (patterns if isinstance(patterns, dict) else {}).items()
        }
    except ValueError:
        return ["alpha_pattern: ignored, and of a form that is not followed here"]
    true = {
        name: factor(resolve(alphas, name, config.get("lora_alpha")), r, bool(config.get("use_rslora")))
        for name, r in ranks.items()
    }
    wrong = [
        n for n in ranks if (own := true[n]) is not None and (a := theirs(n)) is not None and not math.isclose(a, own)
    ]
    if not wrong:
        return []
    asked = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    first = wrong[0]
    return [
        f"{', '.join(asked) or 'r'}: the factor is {says}, so {len(wrong)} of {len(ranks)} layers get another one: "
        f"{first} gets {theirs(first):.6g} instead of {true[first]:.6g}"
    ]


def _missing(config: Mapping[str, Any], also: str) -> list[str]:
    return [key for key in ("r", "lora_alpha", also) if key and key not in config]


def _said(config: Mapping[str, Any], key: str) -> str:
    return f"{key} = {reprlib.repr(config[key])}: not supported"


def _odd_names(tensors: Iterable[str], known: Callable[[str], bool]) -> list[str]:
    """Tensors that are no A and no B, which a consumer refuses by their names."""
    ends = (*LINEAR_SUFFIXES.values(), *EMBEDDING_SUFFIXES.values())
    odd = sorted(key for key in tensors if not key.endswith(ends) and not known(key))
    return [f"{len(odd)} tensors are no LoRA matrices, the first is {odd[0][:200]}"] if odd else []


def _leaves(tensors: Iterable[str], suffixes: Mapping[str, str] = LINEAR_SUFFIXES) -> set[str]:
    """The last parts of the adapted layers' names."""
    ends = tuple(suffixes.values())
    return {key.removesuffix(end).rpartition(".")[2] for key in tensors for end in ends if key.endswith(end)}


def _unusual(tensors: Iterable[str]) -> list[str]:
    odd = sorted(_leaves(tensors) - USUAL - {"lm_head"})
    return [f"the model has linear layers named {reprlib.repr(odd)}"] if odd else []


def _ending(tensors: Iterable[str], targets: tuple[str, ...]) -> set[str]:
    names = {key.removesuffix(suffix) for key in tensors for suffix in MLX.suffixes if key.endswith(suffix)}
    return {name for name in names if name in targets or name.endswith(tuple(f".{target}" for target in targets))}
