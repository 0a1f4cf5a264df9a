"""Read and write adapters as PEFT does: adapter_config.json and adapter_model.safetensors in one folder.

The only file that knows PEFT's names. Ours on the left, PEFT's on the right:

    alpha, dropout              lora_alpha, lora_dropout
    targets                     target_modules
    A, B of a linear layer      base_model.model.<path>.lora_A.weight, .lora_B.weight
    A, B of an embedding        base_model.model.<path>.lora_embedding_A, .lora_embedding_B   (no ".weight")

Which layers an adapter touches is read from the names of its tensors, compared as text with the model's own names;
nothing in a file becomes a path, a pattern or code. Only safetensors are opened. Read before this file: inject.
"""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minilora.files import with_sorted_metadata, write_whole
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.inject import (
    InjectReport,
    adapter_layers,
    count_parameters,
    inject,
)
from minilora.torch_lora.layers import LoRAConv1D, LoRAEmbedding, LoRALayer, LoRALinear, dense_weight, kind_of

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR_SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
BASE_COPY_SUFFIX = ".base_layer.weight"  # PEFT puts a copy of an adapted input embedding beside its matrices
EMBEDDING_SUFFIXES = {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
CONFIG_LIMIT_BYTES = 1_000_000

# Keys that change what an adapter computes in a way this reader does not follow: refused unless empty.
REFUSED = {
    "use_dora": "DoRA rescales the rows of the weight; this reader knows plain LoRA",
    "rank_pattern": "it gives layers different ranks; this reader takes one r for all",
    "alpha_pattern": "it gives layers different strengths; this reader takes one alpha for all",
    "modules_to_save": "it replaces whole modules of the base, not only adds to them",
    "trainable_token_indices": "it replaces rows of the embedding",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it adapts bare parameters, not modules",
    "lora_bias": "it gives B a bias",
    "use_qalora": "it pools the input before A",
    "alora_invocation_tokens": "it switches the adapter on after certain tokens",
    "loftq_config": "it changed the base weights; the adapter is wrong on the original ones",
    "eva_config": "it redistributes ranks over the layers",
    "corda_config": "it changed the base weights; the adapter is wrong on the original ones",
    "arrow_config": "it routes between several adapters",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "it changes the base weights by an SVD",
    "velora_config": "it compresses activations in another way",
    "monteclora_config": "its matrices are random variables",
    "lora_ga_config": "it changed the base weights; the adapter is wrong on the original ones",
}
# Keys that may hold anything: they say nothing of the result, or the tensors' names and shapes say it.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")  # the others (PiSSA, OLoRA, …) move part of W into A and B


def lora_layer(base: nn.Module, *, r: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False) -> LoRALayer:
    """Wrap a base layer in the LoRA layer of its kind."""
    kind = kind_of(base) or LoRALinear  # which refuses what it cannot wrap, and says so
    return kind(base, r=r, alpha=alpha, dropout=0.0 if kind is LoRAEmbedding else dropout, use_rslora=use_rslora)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_name: str | None = None,
    base_sha256: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write a model's adapter as PEFT does, so that PEFT, vLLM and load_adapter open it.

    `base_name` is what PEFT will look the base up by; `base_sha256` lets load_adapter warn on another base.
    Files are written under a temporary name and renamed: a reader never sees half of one.

    Raises:
        ValueError: if the model has no adapter, its layers were made with different settings, or a value in it is
            NaN or infinite; nothing is written then.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("this model has no adapter to save: inject(model, targets, wrap) gives it one")
    config = _config_of(model, layers, base_name, task_type)
    tensors = {
        key: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, layer in layers.items()
        for key, tensor in _by_peft_key(name, layer).items()
    }
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors of this adapter hold NaN or infinite values, the first is {broken[0]}")
    metadata = {"format": "pt"} | ({"base_sha256": base_sha256} if base_sha256 else {})
    folder, config_json = Path(folder), json.dumps(config, indent=2, sort_keys=True) + "\n"
    tensor_file = with_sorted_metadata(save(tensors, metadata))
    write_whole({folder / TENSOR_FILE: tensor_file, folder / CONFIG_FILE: config_json.encode()})


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    wrap: Callable[..., nn.Module] = lora_layer,
    *,
    base_sha256: str | None = None,
) -> InjectReport:
    """Read a PEFT adapter into a model, strictly: every tensor is used and every slot is filled.

    Where the model has no adapters, `wrap(base, r=…, alpha=…, dropout=…, use_rslora=…)` makes them; where it has,
    they must be the file's, layer by layer. Everything is checked before the model is touched. A base other than
    the one named in the file (by its SHA-256, where both are known) is warned of.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, the config asks for something that is not plain LoRA (with the reason), or
            tensors do not fit the model (all mismatches at once).
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors, metadata = _read_tensors(folder / TENSOR_FILE)
    by_layer = _by_layer(model, tensors, config.r)
    _refuse_other_settings(model, by_layer, config)
    _refuse_merged(model)
    _warn_of_another_base(metadata.get("base_sha256"), base_sha256)
    if not adapter_layers(model):
        settings = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout, "use_rslora": config.use_rslora}
        inject(model, [re.compile(re.escape(name)) for name in by_layer], lambda base: wrap(base, **settings))
    layers = adapter_layers(model)
    with torch.no_grad():
        for name, pair in by_layer.items():
            layers[name].A.copy_(pair["A"])
            layers[name].B.copy_(pair["B"])
    return InjectReport(_hits_by_leaf(sorted(by_layer)), count_parameters(model))


def _by_peft_key(name: str, layer: LoRALayer) -> dict[str, Tensor]:
    suffixes = EMBEDDING_SUFFIXES if isinstance(layer, LoRAEmbedding) else LINEAR_SUFFIXES
    return {f"{PREFIX}{name}{suffixes[ours]}": tensor for ours, tensor in layer.adapter_tensors().items()}


def _config_of(
    model: nn.Module, layers: dict[str, LoRALayer], base_name: str | None, task_type: str | None
) -> dict[str, object]:
    settings = {(layer.r, layer.alpha, layer.use_rslora) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(
            f"the adapter's layers differ in (r, alpha, use_rslora): {sorted(settings)}; "
            "this writer puts one of each into the file: give all layers the same"
        )
    [(r, alpha, use_rslora)] = settings
    config: dict[str, object] = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "target_modules": _shortest_targets(model, layers),
        "task_type": task_type,
    }
    return config | ({"use_rslora": True} if use_rslora else {})


def _shortest_targets(model: nn.Module, layers: dict[str, LoRALayer]) -> list[str]:
    """Name the layers by their last parts, or by their whole names where the last parts hit other modules too."""
    leaves = {name.rpartition(".")[2] for name in layers}
    inside = tuple(f"{name}." for name in layers)
    hit = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves and not n.startswith(inside)}
    return sorted(leaves if hit == set(layers) else layers)


def _read_config(path: Path) -> LoRAConfig:
    try:
        if path.stat().st_size > CONFIG_LIMIT_BYTES:
            raise ValueError(f"{path} has more than {CONFIG_LIMIT_BYTES:,} bytes: that is not an adapter's config")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): the file is damaged, fetch it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}, not the object that PEFT writes")
    problems = _config_problems(config)
    if problems:
        raise ValueError(f"{path} describes an adapter that is not plain LoRA:\n  " + "\n  ".join(problems))
    return LoRAConfig(
        r=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=bool(config.get("use_rslora")),
    )


def _config_problems(config: dict[str, object]) -> list[str]:
    problems = [f"{key} = {config[key]!r}: {reason}" for key, reason in REFUSED.items() if config.get(key)]
    unknown = sorted(key for key in config.keys() - REFUSED.keys() - HARMLESS if config[key])
    problems += [
        f"{key} = {config[key]!r}: not a key this reader knows, so it may change the result" for key in unknown
    ]
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type = {config['peft_type']!r}: this reader knows 'LORA'")
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r}: it changes the base's biases; this reader knows 'none'")
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        problems.append(f"init_lora_weights = {init!r}: it moves part of the base's weight into the adapter")
    if not isinstance(config.get("use_rslora"), bool | None):
        problems.append(f"use_rslora = {config['use_rslora']!r}: true or false is needed")
    for key in ("r", "lora_alpha", "lora_dropout"):
        value = config.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"{key} = {value!r}: a number is needed")
    return problems


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = f"; {pickled.name} is a pickle, which can run code: it is never opened" if pickled.exists() else ""
        raise FileNotFoundError(f"there is no {path}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from None


def _by_layer(model: nn.Module, tensors: dict[str, Tensor], r: int) -> dict[str, dict[str, Tensor]]:
    """Sort a file's tensors by the model's layers; refuse what does not fit, all of it at once."""
    expected = _expected_shapes(model, r)
    suffixes = [*LINEAR_SUFFIXES.values(), *EMBEDDING_SUFFIXES.values()]
    by_layer: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        suffix = next((s for s in suffixes if key.endswith(s)), "")
        name = key.removeprefix(PREFIX).removesuffix(suffix) if suffix and key.startswith(PREFIX) else ""
        ours = "A" if suffix in (LINEAR_SUFFIXES["A"], EMBEDDING_SUFFIXES["A"]) else "B"
        if key.startswith(PREFIX) and key.endswith(BASE_COPY_SUFFIX):
            problems += _base_copy_problems(model, key, tensor)
        elif not name:
            problems.append(f"{key}: not the name of a LoRA matrix")
        elif (name, suffix) not in expected:
            problems.append(f"{key}: the model has no layer of that name and kind")
        elif tuple(tensor.shape) != expected[name, suffix]:
            problems.append(f"{key}: shape {tuple(tensor.shape)}, the model has {expected[name, suffix]}")
        elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            problems.append(f"{key}: not finite floats")
        else:
            by_layer.setdefault(name, {})[ours] = tensor
    problems += [f"{name}: has {next(iter(p))} alone, A and B are needed" for name, p in by_layer.items() if len(p) < 2]
    adapted = adapter_layers(model)
    problems += [f"{name}: missing from the file" for name in adapted if name not in by_layer]
    problems += [f"{name}: has no adapter in the model" for name in by_layer if adapted and name not in adapted]
    if problems or not by_layer:
        raise ValueError("this adapter does not fit the model:\n  " + "\n  ".join(sorted(problems) or ["it is empty"]))
    return by_layer


def _base_copy_problems(model: nn.Module, key: str, copy: Tensor) -> list[str]:
    """A copy of a base weight tells nothing new where it equals the model's own; otherwise the base is another one."""
    module = dict(model.named_modules()).get(key.removeprefix(PREFIX).removesuffix(BASE_COPY_SUFFIX))
    base = module.base if isinstance(module, LoRALayer) else module
    if isinstance(base, nn.Embedding) and torch.equal(dense_weight(base, copy.dtype), copy):
        return []
    return [f"{key}: not the model's own weight: it was trained or resized, which this reader does not follow"]


def _expected_shapes(model: nn.Module, r: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Every matrix that a LoRA adapter of this r could have in this model, by layer and PEFT suffix."""
    shapes: dict[tuple[str, str], tuple[int, int]] = {}
    for name, module in model.named_modules():
        base = module.base if isinstance(module, LoRALayer) else module
        kind = kind_of(base)
        if kind is None:
            continue
        in_features, out_features = kind.features(base)
        suffixes = EMBEDDING_SUFFIXES if kind is LoRAEmbedding else LINEAR_SUFFIXES
        shapes[name, suffixes["A"]] = (r, in_features)
        shapes[name, suffixes["B"]] = (out_features, r)
    return shapes


def _refuse_other_settings(model: nn.Module, by_layer: dict[str, dict[str, Tensor]], config: LoRAConfig) -> None:
    theirs = (config.r, config.alpha, config.use_rslora)
    other = {n: s for n, y in adapter_layers(model).items() if (s := (y.r, y.alpha, y.use_rslora)) != theirs}
    if other:
        name, ours = next(iter(other.items()))
        raise ValueError(
            f"the file has (r, alpha, use_rslora) = {theirs}, but {len(other)} layers of the model differ, "
            f"the first is {name} with {ours}: remove(model) first, and let load_adapter make the layers"
        )


def _refuse_merged(model: nn.Module) -> None:
    merged = [name for name, layer in adapter_layers(model).items() if layer.is_merged]
    if merged:
        raise ValueError(
            f"{len(merged)} layers of the model are merged, the first is {merged[0]}: their A and B do nothing now, "
            "so loading would change nothing; unmerge() them first"
        )


def _warn_of_another_base(theirs: str | None, ours: str | None) -> None:
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"this adapter was trained on a base with SHA-256 {theirs[:12]}…, this base has {ours[:12]}…: "
            "it fits in shape, but what it learned is the difference to another model",
            stacklevel=3,
        )


def _hits_by_leaf(names: list[str]) -> dict[str, list[str]]:
    hits: dict[str, list[str]] = {}
    for name in names:
        hits.setdefault(name.rpartition(".")[2], []).append(name)
    return hits
