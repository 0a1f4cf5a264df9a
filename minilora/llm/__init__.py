"""A real language model of the Llama family, to be fine-tuned. Knows nothing of LoRA.

    config      what a model is made of, in numbers       model        RMSNorm, RoPE, GQA, SwiGLU, KV cache
    load        name, folder or file → model, tokenizer   generation   logits → tokens: greedy, sampled, in batches
    tokenizer   text ↔ ids                                chat         somebody else's chat template, run safely
    smollm2     the model that comes with minilora        read_gguf    llama.cpp's files, read
    sizes       parameters and bytes, without weights     write_gguf   models and adapters for llama.cpp, written
    setup       what each method trains, and training_memory, activations: what a step takes; all without weights

Read config, model and generation first; everything else brings them weights and words.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.llm.config import ModelConfig
    from minilora.llm.generation import generate, stream
    from minilora.llm.load import load_model
    from minilora.llm.model import Decoder, KVCache
    from minilora.llm.tokenizer import Tokenizer

__all__ = ["Decoder", "KVCache", "ModelConfig", "Tokenizer", "generate", "load_model", "stream"]

_HOME = {
    "Decoder": "model",
    "KVCache": "model",
    "ModelConfig": "config",
    "Tokenizer": "tokenizer",
    "generate": "generation",
    "load_model": "load",
    "stream": "generation",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `python -m minilora.llm.smollm2` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"minilora.llm has no {name!r}; it offers {__all__}")
    return getattr(import_module(f"minilora.llm.{_HOME[name]}"), name)
