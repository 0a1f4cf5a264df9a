"""Real language models as rows of numbers, and the tensors that follow from them: no weights, no torch.

An `Architecture` is a row: one of `ARCHITECTURES`, or any config.json that `read_config` understands. From a row
follows the name and shape of every parameter, as Hugging Face's model has them, and which of them a target names.

    hidden         features between the layers         intermediate   features inside the feed-forward part
    n_heads        heads of queries                    n_kv_heads     heads of keys and values
    tied           the output head is the embedding    fused_qkv      one matrix makes q, k and v

Read before this file: nothing. Read after it: sizes, which counts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
QKV = ("q_proj", "k_proj", "v_proj")
ALL_LINEAR = "all-linear"  # every linear layer but the output head


@dataclass(frozen=True)
class Architecture:
    """A decoder's numbers. `family` says which tensors they make: Llama's or GPT-2's."""

    family: str
    n_layers: int
    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int  # fewer than n_heads: several query heads share one key and value head, [GQA]
    head_dim: int
    vocab: int
    n_positions: int = 0  # rows of a learned position embedding; 0 where positions are rotations, [RoPE]
    tied: bool = False
    fused_qkv: bool = False
    biased: tuple[str, ...] = ()  # last parts of the names of those linear layers that have a bias


_llama = partial(Architecture, "llama")


def _gpt2(
    n_layers: int, hidden: int, n_heads: int, *, vocab: int = 50257, n_positions: int = 1024, fused_qkv: bool = True
) -> Architecture:
    return Architecture(
        family="gpt2",
        n_layers=n_layers,
        hidden=hidden,
        intermediate=4 * hidden,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden // n_heads,
        vocab=vocab,
        n_positions=n_positions,
        tied=True,
        fused_qkv=fused_qkv,
        biased=("c_attn", *QKV, "c_proj", "c_fc"),
    )


# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    #             layers hidden intermediate heads kv_heads head_dim vocab
    "llama-2-7b":   _llama(32, 4096, 11008, 32, 32, 128,  32000),
    "llama-2-13b":  _llama(40, 5120, 13824, 40, 40, 128,  32000),
    "llama-2-70b":  _llama(80, 8192, 28672, 64,  8, 128,  32000),
    "llama-3-8b":   _llama(32, 4096, 14336, 32,  8, 128, 128256),
    "llama-3-70b":  _llama(80, 8192, 28672, 64,  8, 128, 128256),
    "llama-3.2-1b": _llama(16, 2048,  8192, 32,  8,  64, 128256, tied=True),
    "llama-3.2-3b": _llama(28, 3072,  8192, 24,  8, 128, 128256, tied=True),
    "mistral-7b":   _llama(32, 4096, 14336, 32,  8, 128,  32000),
    "qwen2.5-0.5b": _llama(24,  896,  4864, 14,  2,  64, 151936, tied=True, biased=QKV),
    "qwen2.5-7b":   _llama(28, 3584, 18944, 28,  4, 128, 152064, biased=QKV),
    "smollm2-135m": _llama(30,  576,  1536,  9,  3,  64,  49152, tied=True),
    "gpt2":         _gpt2(12,  768, 12),
    "gpt2-medium":  _gpt2(24, 1024, 16),
    "gpt2-large":   _gpt2(36, 1280, 20),
    "gpt2-xl":      _gpt2(48, 1600, 25),
    # GPT-2's layer with q, k and v apart: its checkpoint is not public, and [LoRA] counts W_q and W_v singly.
    "gpt-3-175b":   _gpt2(96, 12288, 96, n_positions=2048, fused_qkv=False),
}
# fmt: on


def find_architecture(name_or_path: str) -> Architecture:
    """Look a name up in `ARCHITECTURES`, or read a Hugging Face config.json (the file, or its folder).

    Raises:
        ValueError: if there is neither (offers near names), or the config is of a kind that cannot be counted.

    >>> find_architecture("llama-2-7b").hidden
    4096
    """
    name = name_or_path.lower()
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return read_config(path)
    near = get_close_matches(name.rsplit("/", 1)[-1], ARCHITECTURES, n=3, cutoff=0.5)
    raise ValueError(
        f"no architecture is named {name_or_path!r}, and there is no such config.json: "
        + (f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(ARCHITECTURES)}")
    )


# --- config.json --------------------------------------------------------------------------------------------------

NOT_COUNTED = {
    "bert": "it is an encoder",
    "gemma2": "its layers have four norms",
    "mixtral": "its feed-forward part is a set of experts",
    "phi3": "it fuses q with k and v, and gate with up",
    "qwen2_moe": "its feed-forward part is a set of experts",
    "qwen3": "its attention has norms of its own",
    "t5": "it is an encoder and a decoder",
}


def read_config(path: Path) -> Architecture:
    """Read a Hugging Face config.json of model type llama, mistral, qwen2 or gpt2.

    Raises:
        ValueError: if it is not JSON, is of another model type (with the reason), or its numbers are missing or
            impossible (all of them at once).
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    readers = {"llama": _read_llama, "mistral": _read_llama, "qwen2": _read_llama, "gpt2": _read_gpt2}
    if not isinstance(model_type, str) or model_type not in readers:
        raise ValueError(
            f"{path} is of model type {model_type!r}, which cannot be counted: "
            f"{NOT_COUNTED.get(str(model_type), 'its tensors are not described here')}; "
            f"the types that can are {', '.join(readers)}"
        )
    try:
        return readers[model_type](config)
    except ValueError as error:
        raise ValueError(f"{path} cannot be counted: {error}") from error


def _read_llama(config: Mapping[str, Any]) -> Architecture:
    if config.get("mlp_bias"):
        raise ValueError("mlp_bias is true, and no published Llama has biases there")
    n_layers, hidden, intermediate, n_heads, vocab = _counts(
        config, "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"
    )
    # An absent key means what it means to transformers: as many heads of keys as of queries, but 8 for Mistral.
    n_kv_heads = 8 if config["model_type"] == "mistral" else n_heads
    n_kv_heads, head_dim = _counts(
        {"num_key_value_heads": n_kv_heads, "head_dim": hidden // n_heads}
        | {key: config[key] for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None},
        "num_key_value_heads",
        "head_dim",
    )
    biased = QKV if config["model_type"] == "qwen2" else (*QKV, "o_proj") if config.get("attention_bias") else ()
    tied = bool(config.get("tie_word_embeddings", False))
    return _llama(n_layers, hidden, intermediate, n_heads, n_kv_heads, head_dim, vocab, tied=tied, biased=biased)


def _read_gpt2(config: Mapping[str, Any]) -> Architecture:
    for key, usual in {"add_cross_attention": False, "tie_word_embeddings": True}.items():
        if config.get(key, usual) is not usual:
            raise ValueError(f"{key} is {config[key]!r}, and no published GPT-2 has that")
    n_layers, hidden, n_heads, n_positions, vocab = _counts(
        config, "n_layer", "n_embd", "n_head", "n_positions", "vocab_size"
    )
    arch = _gpt2(n_layers, hidden, n_heads, vocab=vocab, n_positions=n_positions)
    if config.get("n_inner") is None:
        return arch
    return replace(arch, intermediate=_counts(config, "n_inner")[0])


def _counts(config: Mapping[str, Any], *keys: str) -> list[int]:
    """The numbers under these keys, each one that a model can have."""
    most = dict.fromkeys(("num_hidden_layers", "n_layer"), 10_000)
    problems = [
        f"{key} is {config[key]!r}" if key in config else f"{key} is missing"
        for key in keys
        if type(config.get(key)) is not int or not 0 < config[key] <= most.get(key, 10_000_000)
    ]
    if problems:
        raise ValueError(f"{', '.join(problems)}; each must be a whole number above 0, as a model can have it")
    return [config[key] for key in keys]


# --- names and shapes, as in the checkpoint -----------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A matrix that an adapter can stand beside. Those of a layer that have the same `reads` share one input."""

    name: str
    in_features: int
    out_features: int
    reads: str = ""
    bias: bool = False

    @property
    def n_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def params(self) -> int:
        return self.n_weights + (self.out_features if self.bias else 0)

    def lora_params(self, r: int) -> int:
        """Count A (r, in) and B (out, r).

        >>> Linear("q_proj", 4096, 4096).lora_params(8)
        65536
        """
        return r * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Names:
    """What a family calls its parts."""

    layer: str
    embedding: str
    norms: tuple[str, str]
    last_norm: str
    norm_parts: tuple[str, ...]


NAMES = {
    "llama": Names(
        "model.layers", "model.embed_tokens", ("input_layernorm", "post_attention_layernorm"), "model.norm", ("weight",)
    ),
    "gpt2": Names("transformer.h", "transformer.wte", ("ln_1", "ln_2"), "transformer.ln_f", ("weight", "bias")),
}
POSITIONS = "transformer.wpe"
HEAD = "lm_head"


def layer_linears(arch: Architecture) -> list[Linear]:
    """List the linear layers of one decoder layer, in the order in which they run."""
    h, i = arch.hidden, arch.intermediate
    q, kv = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    if arch.family == "llama":
        rows = [
            ("self_attn.q_proj", h, q, "attention input"),
            ("self_attn.k_proj", h, kv, "attention input"),
            ("self_attn.v_proj", h, kv, "attention input"),
            ("self_attn.o_proj", q, h, "attention output"),
            ("mlp.gate_proj", h, i, "mlp input"),
            ("mlp.up_proj", h, i, "mlp input"),
            ("mlp.down_proj", i, h, "mlp product"),
        ]
    else:
        apart = [(f"attn.{name}", h, h, "attention input") for name in QKV]
        rows = [
            *([("attn.c_attn", h, 3 * h, "attention input")] if arch.fused_qkv else apart),
            ("attn.c_proj", h, h, "attention output"),
            ("mlp.c_fc", h, i, "mlp input"),
            ("mlp.c_proj", i, h, "mlp product"),
        ]
    return [Linear(*row, bias=row[0].rsplit(".", 1)[1] in arch.biased) for row in rows]


def linears(arch: Architecture) -> dict[str, Linear]:
    """Every linear layer under its full name, the output head left out."""
    prefix, one_layer = NAMES[arch.family].layer, layer_linears(arch)
    return {f"{prefix}.{n}.{linear.name}": linear for n in range(arch.n_layers) for linear in one_layer}


def end_matrices(arch: Architecture) -> dict[str, Linear]:
    """The matrices at both ends: token and position embedding, and the output head (also where it is tied)."""
    ends = {NAMES[arch.family].embedding: Linear("embedding", arch.vocab, arch.hidden)}
    if arch.n_positions:
        ends[POSITIONS] = Linear("positions", arch.n_positions, arch.hidden)
    return ends | {HEAD: Linear(HEAD, arch.hidden, arch.vocab)}


def parameter_shapes(arch: Architecture) -> dict[str, Shape]:
    """The name and shape of every parameter, as Hugging Face's model has them; a tied head is not a second one.

    >>> parameter_shapes(ARCHITECTURES["gpt2"])["transformer.h.0.attn.c_attn.weight"]  # GPT-2 stores (in, out)
    (768, 2304)
    """
    names, h = NAMES[arch.family], arch.hidden
    shapes: dict[str, Shape] = {f"{names.embedding}.weight": (arch.vocab, h)}
    if arch.n_positions:
        shapes[f"{POSITIONS}.weight"] = (arch.n_positions, h)
    for name, linear in linears(arch).items():
        out_in = (linear.out_features, linear.in_features)
        shapes[f"{name}.weight"] = out_in if arch.family == "llama" else out_in[::-1]
        if linear.bias:
            shapes[f"{name}.bias"] = (linear.out_features,)
    norms = [f"{names.layer}.{n}.{norm}" for n in range(arch.n_layers) for norm in names.norms]
    shapes |= {f"{norm}.{part}": (h,) for norm in [*norms, names.last_norm] for part in names.norm_parts}
    return shapes if arch.tied else shapes | {f"{HEAD}.weight": (arch.vocab, h)}


def match_targets(arch: Architecture, targets: str | Sequence[str]) -> dict[str, Linear]:
    """Find the matrices that targets name: by the full name, or its end after a dot. "all-linear": all but the head.

    GPT-2 has two layers that end in c_proj: the target c_proj hits both, attn.c_proj one.

    Raises:
        ValueError: naming every target that hits nothing, and the names that exist.

    >>> list(match_targets(ARCHITECTURES["gpt2"], ["h.0.attn.c_proj"]))
    ['transformer.h.0.attn.c_proj']
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    modules = linears(arch) | end_matrices(arch)
    hits = {
        target: linears(arch).keys() if target == ALL_LINEAR else [name for name in modules if _is_hit(name, target)]
        for target in wanted
    }
    missed = [target for target, names in hits.items() if not names]
    if missed or not wanted:
        there = [ALL_LINEAR, *dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules)]
        near = {target: get_close_matches(target, there, n=2, cutoff=0.5) for target in missed}
        hints = [f"; did you mean {' or '.join(map(repr, names))} for {t!r}?" for t, names in near.items() if names]
        what = f"no module is named {missed}" if missed else "no targets were given"
        raise ValueError(f"{what}; this architecture's targets are {there}{''.join(hints)}")
    hit = {name for names in hits.values() for name in names}
    return {name: linear for name, linear in modules.items() if name in hit}


def _is_hit(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
