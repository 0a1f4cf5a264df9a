"""Read a GGUF file, llama.cpp's format, as if it were a Hugging Face folder.

    config                                 what config.json would say
    tokenizer_json, tokenizer_settings     what tokenizer.json and tokenizer_config.json would say
    shapes, read                           names and shapes of the weights; one weight, dequantized

Decoding the quantized blocks is the `gguf` library's work. What is done here is renaming, and undoing the one change
that llama.cpp's converter makes to the weights of Llama models (`_unpermute`). No torch is needed.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from jaxtyping import Float
from numpy import ndarray
from tokenizers import Regex, decoders, models, pre_tokenizers

from minilora.llm.config import Llama3Scaling, ModelConfig

ARCHITECTURES = ("llama", "qwen2")

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How a text is cut before byte pairs are merged, by the name in `tokenizer.ggml.pre`: each expression in turn cuts the
# pieces of the one before into its matches and what lies between them. As in llama.cpp's src/llama-vocab.cpp.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}",),
    "qwen2": (rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}",),
}
WHOLE_WORDS_FIRST = ("llama-bpe",)  # a piece that is in the vocabulary is taken as it is, before any merge

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


class GGUFModel:
    """An open GGUF file: `config`, `tokenizer_json`, `tokenizer_settings`, `shapes`, and `read` one weight."""

    def __init__(self, path: Path) -> None:
        """Raises: ValueError if the file is not a whole GGUF file, or of a kind that is not read here."""
        self.path = path
        self._reader = _open(path)
        self.metadata = {name: field.contents() for name, field in self._reader.fields.items()}
        architecture = self.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(f"{path} holds a {architecture!r} model; those read here are {list(ARCHITECTURES)}")
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._rope_factors = tensors.pop("rope_freqs.weight", None)  # not a weight: see _rope_scaling
        self._tensors = {_hf_name(name): tensor for name, tensor in tensors.items()}
        self.tokenizer_json = tokenizer_json_of(self.metadata)
        self.tokenizer_settings = _tokenizer_settings(self.metadata)
        self.config = self._config(architecture)

    @property
    def name(self) -> str:
        """What the file calls itself, as a hub would: "owner/name"."""
        names = (self.metadata.get("general.organization"), self.metadata.get("general.name"))
        return "/".join(name for name in names if name) or self.path.stem

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight under its Hugging Face name."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Float[ndarray, "..."]:
        """One weight by its Hugging Face name, dequantized to float32."""
        tensor = self._tensors[name]
        w = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        if self.config["model_type"] == "llama" and "self_attn.q_proj" in name:
            w = _unpermute(w, self.config["num_attention_heads"])
        if self.config["model_type"] == "llama" and "self_attn.k_proj" in name:
            w = _unpermute(w, self.config["num_key_value_heads"])
        return np.require(w, np.float32, ["C_CONTIGUOUS", "WRITEABLE"])

    def _config(self, architecture: str) -> dict[str, Any]:
        """The metadata under the names of a Hugging Face config.json."""

        def value(key: str, default: Any = None) -> Any:
            found = self.metadata.get(f"{architecture}.{key}", default)
            if found is None:
                raise ValueError(f"{self.path} lacks {architecture}.{key} in its metadata")
            return found

        hidden_size, n_heads = value("embedding_length"), value("attention.head_count")
        epsilon = value("attention.layer_norm_rms_epsilon")
        config = {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[architecture]],
            "model_type": architecture,
            "vocab_size": len(self.metadata["tokenizer.ggml.tokens"]),
            "hidden_size": hidden_size,
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": n_heads,
            "num_key_value_heads": value("attention.head_count_kv", n_heads),
            "head_dim": value("attention.key_length", hidden_size // n_heads),
            "max_position_embeddings": value("context_length"),
            "rms_norm_eps": float(f"{epsilon:.6g}"),  # 1e-5, not its float32 neighbour
            "rope_theta": value("rope.freq_base", 10_000.0),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }
        if self._rope_factors is not None:
            config["rope_scaling"] = _rope_scaling(self._rope_factors.data, config)
        return config


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}): fetch it again") from error


def _hf_name(name: str) -> str:
    """
    >>> _hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name in TENSORS:
        return TENSORS[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"
    raise ValueError(f"the GGUF file has a tensor {name!r}, which has no place in a Llama model")


def _unpermute(w: Float[ndarray, "out ..."], n_heads: int) -> Float[ndarray, "out ..."]:
    """Undo the reordering of the rows of q_proj and k_proj that llama.cpp's converter makes.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head together, Hugging Face rows i and i + half.
    """
    return w.reshape(n_heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _rope_scaling(factors: Float[ndarray, "half"], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings behind a table of rotary factors.

    llama.cpp's converter writes the table in place of the settings, for Llama 3.1 and later. Those models all have the
    same settings but for `factor`, which is the largest in the table.
    """
    scaling = Llama3Scaling(
        factor=float(np.max(factors)), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain = ModelConfig.from_hf(config).rope_frequencies()
    ours = [frequency / scaling.scale(frequency) for frequency in plain]
    if not np.allclose(ours, factors, rtol=1e-4):
        raise ValueError("the GGUF file stretches its rotary positions in a way that is not Llama 3.1's")
    return {"rope_type": "llama3", **vars(scaling)}


def tokenizer_json_of(metadata: Mapping[str, Any]) -> str:
    """A tokenizer.json that splits texts as llama.cpp does."""
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        raise ValueError(
            f"the GGUF file's tokenizer is of the kind {metadata.get('tokenizer.ggml.model')!r}; only byte-level BPE "
            "('gpt2') is read from GGUF: load this model's Hugging Face folder instead, which has a tokenizer.json"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"the GGUF file's pre-tokenizer is {pre!r}; those known are {sorted(PRE_TOKENIZERS)}")
    missing_keys = [key for key in ("tokens", "token_type", "merges") if f"tokenizer.ggml.{key}" not in metadata]
    if missing_keys:
        raise ValueError(f"the GGUF file's tokenizer lacks {missing_keys}")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in WHOLE_WORDS_FIRST))
    backend.pre_tokenizer = _pre_tokenizer(PRE_TOKENIZERS[pre], vocabulary)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
            backend.add_special_tokens([added]) if kind == CONTROL else backend.add_tokens([added])
    return backend.to_str()


def _pre_tokenizer(patterns: Iterable[str], vocabulary: Mapping[str, int]) -> pre_tokenizers.PreTokenizer:
    """Cut by each pattern in turn, then write every byte as one character."""
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys())
    if missing:  # SmolLM2's vocabulary lacks 21 bytes: they are left out, and nothing merges across them
        steps.append(pre_tokenizers.Split(Regex("[" + "".join(map(re.escape, missing)) + "]"), "removed"))
    return pre_tokenizers.Sequence(steps)


def _tokenizer_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer_config.json would say."""
    tokens = metadata["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            settings[name] = tokens[number]
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return settings
