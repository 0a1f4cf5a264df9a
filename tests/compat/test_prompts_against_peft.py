"""Prefix and prompt tuning in PEFT and here, before the same tiny Llama: outputs, gradients, three steps, and files."""

import json

import pytest
import torch
from beside_peft import assert_files_go_both_ways, assert_same_training, copy_from_peft
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_decoder_against_transformers import ours_like, tiny_peer
from torch import Tensor, nn

from minilora.llm import Decoder, generate
from minilora.methods import PrefixTuning, PromptTuning
from minilora.methods.peft_prompt import load_prompt, save_prompt
from minilora.torch_lora import inject

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
N, MLP = 5, 11
PEERS = ["llama, every head its own keys", "llama, two heads a key", "llama, tied", "qwen2"]
CONFIGS = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM"),
    "prefix, MLP": lambda: PrefixTuningConfig(
        num_virtual_tokens=N, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=MLP
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM"),
}
WRAPS = {
    "prefix": lambda base: PrefixTuning(base, n_virtual=N),
    "prefix, MLP": lambda base: PrefixTuning(base, n_virtual=N, mlp_features=MLP),
    "prompt": lambda base: PromptTuning(base, n_virtual=N),
}
TOKENS = torch.arange(2 * 12).reshape(2, 12) * 7 % 99


def named(ours: Decoder, theirs: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Every trained tensor of ours with PEFT's own."""
    encoder = theirs.prompt_encoder["default"]
    pairs = {"P": (ours.model.P, encoder.embedding.weight)}
    for name, tensor in ours.model.adapter_tensors().items():
        if name.startswith("mlp."):
            pairs[name] = (tensor, encoder.get_parameter(name.replace("mlp", "transform")))
    return pairs


def logits_of(model: nn.Module) -> Tensor:
    """Of the text: PEFT's prompt tuning gives logits of the virtual tokens too."""
    out = model(TOKENS) if isinstance(model, Decoder) else model(input_ids=TOKENS).logits
    return out[:, -TOKENS.shape[1] :]


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(params=PEERS)
def both(request, kind):
    ours = ours_like(tiny_peer(request.param))
    theirs = get_peft_model(tiny_peer(request.param), CONFIGS[kind]()).eval()
    inject(ours, ["model"], WRAPS[kind])
    copy_from_peft(named(ours, theirs))
    return ours, theirs, request.param


def test_outputs_and_gradients_before_and_after_three_steps(both):
    ours, theirs, _ = both
    pairs = named(ours, theirs)
    assert {id(its) for _, its in pairs.values()} == {id(p) for p in theirs.parameters() if p.requires_grad}

    def backward_of_both():
        logits = logits_of(ours), logits_of(theirs)
        for side in logits:
            side.logsumexp(dim=-1).sum().backward()
        return logits

    assert_same_training(pairs, backward_of_both)


def test_greedy_tokens_are_pefts(both):
    ours, theirs, _ = both
    answers = theirs.generate(
        input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert generate(ours, TOKENS.tolist(), max_new_tokens=10) == answers[:, -10:].tolist()


@torch.no_grad()
def test_files_go_both_ways(both, kind, tmp_path):
    ours, theirs, peer = both
    bases = ours_like(tiny_peer(peer)), tiny_peer(peer)
    assert_files_go_both_ways(ours, theirs, tmp_path, save_prompt, load_prompt, logits_of, bases)

    written, read = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    free = {"base_model_name_or_path", "encoder_hidden_size", "prefix_projection"}
    assert {key: read[key] for key in written.keys() - free} == {key: written[key] for key in written.keys() - free}
