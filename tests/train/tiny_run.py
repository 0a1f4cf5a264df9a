"""A base model of a few thousand weights, with SmolLM2's tokenizer, and samples: for runs that take a second."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from minilora.llm import Decoder, ModelConfig
from minilora.llm.load import model_folder

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_base(folder: Path) -> Path:
    """A Hugging Face folder of a random Llama."""
    folder.mkdir()
    for file in model_folder("smollm2-135m").glob("tokenizer*.json"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(1)
    model = Decoder(ModelConfig.from_hf(CONFIG))
    weights = {name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors")
    return folder


def write_data(path: Path, count: int) -> Path:
    """Samples of several lengths."""
    rows = [{"prompt": f"{n}?" * (1 + n % 3), "completion": f"{n}!" * (1 + n % 5)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
