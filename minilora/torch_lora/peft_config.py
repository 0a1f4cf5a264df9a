"""adapter_config.json, PEFT's description of an adapter: what is read, what is refused and why, what is written.

    ours                        PEFT's
    alpha, dropout              lora_alpha, lora_dropout
    r, alpha of single layers   rank_pattern, alpha_pattern: torch_lora/peft_patterns
    biases that are replaced    bias: "none", "all", or "lora_only" (those of the adapted layers)
    modules replaced whole      modules_to_save: the ends of their names (without regard to dots)

A key that changes what the adapter computes, in a way that is not read here, is refused; so is one that nobody knows.
Read before this file: config, peft_patterns.
"""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.peft_patterns import NamePattern, describe, parse_pattern, resolve

CONFIG_FILE = "adapter_config.json"
CONFIG_LIMIT_BYTES = 1_000_000
PATTERN_LIMIT = 10_000  # more than any model has layers: each is compared with every layer's name

# Keys that change what an adapter computes in a way this reader does not follow: refused unless empty.
REFUSED = {
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
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
BIASES = ("none", "all", "lora_only")
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")  # the others (PiSSA, OLoRA, …) move part of W into A and B


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What of a config decides the result: the layers' settings, and which other tensors the adapter replaces."""

    default: LoRAConfig
    rank_pattern: Mapping[NamePattern, int] = field(default_factory=dict)
    alpha_pattern: Mapping[NamePattern, float] = field(default_factory=dict)
    bias: str = "none"
    use_dora: bool = False  # each layer has a magnitude m as well: methods/dora
    modules_to_save: tuple[str, ...] = ()
    sha256: str = ""  # see config_sha256
    _settings: dict[str, LoRAConfig] = field(default_factory=dict, init=False, repr=False, compare=False)

    def settings_of(self, name: str) -> LoRAConfig:
        """The settings of one layer, by its name in the base model; kept, as each name is asked for several times."""
        if name not in self._settings:
            self._settings[name] = LoRAConfig(
                r=resolve(self.rank_pattern, name, self.default.r),
                alpha=resolve(self.alpha_pattern, name, self.default.alpha),
                dropout=self.default.dropout,
                use_rslora=self.default.use_rslora,
            )
        return self._settings[name]

    def idle_patterns(self, names: Mapping[str, Any]) -> list[str]:
        """The patterns that hit none of these layers, as they stand in the file."""
        patterns = {**self.rank_pattern, **self.alpha_pattern}
        return sorted(pattern.text for pattern in patterns if not any(map(pattern.hits, names)))


def read_config(path: Path) -> AdapterConfig:
    """Read an adapter_config.json.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not the JSON object that PEFT writes, or asks for what is not read here (all of it at once,
            with the reasons).
    """
    config = read_json_object(path)
    problems = problems_in(config)
    if problems:
        raise ValueError(f"{path} describes an adapter that is not plain LoRA:\n  " + "\n  ".join(problems))
    return AdapterConfig(
        default=LoRAConfig(
            r=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            use_rslora=bool(config.get("use_rslora")),
        ),
        rank_pattern={parse_pattern(text): r for text, r in (config.get("rank_pattern") or {}).items()},
        alpha_pattern={parse_pattern(text): alpha for text, alpha in (config.get("alpha_pattern") or {}).items()},
        bias=config.get("bias", "none"),
        use_dora=bool(config.get("use_dora")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        sha256=config_sha256(config),
    )


def config_sha256(config: Mapping[str, Any]) -> str:
    """A hash of what a config says that could matter: the tensors' file names by it the one it is written with.

    The rest may change: a base is renamed, or a tool writes the same in other words, with keys that are empty.
    """
    said = {key: value for key, value in config.items() if key not in HARMLESS and value}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def config_of(layers: Mapping[str, Any], targets: list[str]) -> dict[str, object]:
    """Describe layers, by name, as PEFT does: all that follows from their r, alpha, dropout and use_rslora.

    Raises:
        ValueError: if they differ in use_rslora, of which PEFT has one for all.
    """
    if len({layer.use_rslora for layer in layers.values()}) > 1:
        names = {layer.use_rslora: name for name, layer in layers.items()}
        raise ValueError(
            f"the adapter's layers differ in use_rslora: {names[True]} has it, {names[False]} has not; "
            "PEFT's config has one for all: give all layers the same"
        )
    r, rank_pattern = describe({name: layer.r for name, layer in layers.items()})
    alpha, alpha_pattern = describe({name: layer.alpha for name, layer in layers.items()})
    config: dict[str, object] = {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "target_modules": targets,
    }
    use_rslora = next(iter(layers.values())).use_rslora
    unusual = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_rslora": use_rslora}
    return config | {key: value for key, value in unusual.items() if value}  # older versions of PEFT know few keys


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file that holds one object.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is larger than CONFIG_LIMIT_BYTES, not JSON (NaN is not), names a key twice, or is no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    if path.stat().st_size > CONFIG_LIMIT_BYTES:
        raise ValueError(f"{path} has more than {CONFIG_LIMIT_BYTES:,} bytes: that is not an adapter's config")
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_of_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): the file is damaged, fetch it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}, not the object that PEFT writes")
    return config


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"it names {reprlib.repr(key)} twice")
        made[key] = value
    return made


def problems_in(config: dict[str, Any]) -> list[str]:
    """What a config asks for that is not read here, one reason a line."""

    def say(key: str, reason: str) -> str:
        return f"{reprlib.repr(key)[1:-1]} = {reprlib.repr(config[key])}: {reason}"

    problems = [say(key, reason) for key, reason in REFUSED.items() if config.get(key)]
    unknown = sorted(key for key in config.keys() - REFUSED.keys() - HARMLESS - READ if config[key])
    problems += [say(key, "not a key this reader knows, so it may change the result") for key in unknown]
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(say("peft_type", "this reader knows 'LORA'"))
    if config.get("bias", "none") not in BIASES:
        problems.append(say("bias", f"one of {BIASES} is needed"))
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        problems.append(say("init_lora_weights", "it moves part of the base's weight into the adapter"))
    problems += [
        say(key, "true or false is needed")
        for key in ("use_dora", "use_rslora")
        if not isinstance(config.get(key), bool | None)
    ]
    problems += [
        say(key, "a number is needed")
        for key in ("r", "lora_alpha", "lora_dropout")
        if key in config and not is_number(config[key])
    ]
    if isinstance(config.get("r"), float):
        problems.append(say("r", "a whole number is needed"))
    problems += _pattern_problems(config, "rank_pattern") + _pattern_problems(config, "alpha_pattern")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
        problems.append(say("modules_to_save", "a list of names is needed"))
    elif saved and config.get("ensure_weight_tying"):
        problems.append(say("ensure_weight_tying", "it saves a module that modules_to_save does not name"))
    return problems


def _pattern_problems(config: dict[str, Any], key: str) -> list[str]:
    """What is wrong with rank_pattern or alpha_pattern; each value is checked as a layer's own r or alpha would be."""
    patterns = config.get(key)
    if patterns is None:
        return []
    if not isinstance(patterns, dict):
        return [f"{key} = {reprlib.repr(patterns)}: an object of names and numbers is needed"]
    if len(patterns) > PATTERN_LIMIT:
        return [f"{key} has {len(patterns):,} entries: more than {PATTERN_LIMIT:,} are not read"]
    problems = []
    for text, value in patterns.items():
        try:
            parse_pattern(text)
            if not (is_number(value) and (isinstance(value, int) or key == "alpha_pattern")):
                raise ValueError(f"{reprlib.repr(value)} is not a {'whole ' * (key == 'rank_pattern')}number")
            LoRAConfig(r=value) if key == "rank_pattern" else LoRAConfig(alpha=value)
        except ValueError as error:
            problems.append(f"{key}[{reprlib.repr(text)}]: {error}")
    return problems


def is_number(value: object) -> bool:
    """Whether a JSON value is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
