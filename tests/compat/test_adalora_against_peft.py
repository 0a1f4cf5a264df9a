"""AdaLoRA in PEFT and here, on the same models: outputs, gradients with the penalty, the budget's choices, and files.

PEFT divides by r + 1e-5 where we divide by r: with r = 8 the update differs by 1.3e-6 of its size, which is within
float32's tolerances.
"""

import json

import pytest
import torch
from beside_peft import (
    CLOSE,
    QUIET,
    TOKENS,
    assert_files_go_both_ways,
    assert_same_training,
    copy_from_peft,
    pairs,
    tiny,
)
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from minilora.methods import RankAllocator, RankSchedule, adalora_layer, orthogonality, rank_report, to_lora
from minilora.methods.adalora import adalora_layers
from minilora.methods.peft_adalora import load_adalora, save_adalora
from minilora.torch_lora import inject, save_adapter

pytestmark = [
    *QUIET,
    # It takes AdaLoRA's rank_pattern for LoRA's here, says that it hits nothing, and reads it all the same.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
R, ALPHA, TARGET_R, N_STEPS, T_INIT, T_FINAL = 8, 12, 3, 14, 2, 4
PEFT_NAMES = {letter: f"lora_{letter}.default" for letter in "ABE"}


def in_peft(kind: str, delta_t: int = 1) -> PeftModel:
    """The model under PEFT, all three of each layer away from zero."""
    budget = {"init_r": R, "target_r": TARGET_R, "total_step": N_STEPS, "tinit": T_INIT, "tfinal": T_FINAL}
    smoothing = {"deltaT": delta_t, "beta1": 0.7, "beta2": 0.6, "orth_reg_weight": 0.3}
    places = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    places |= {"task_type": "CAUSAL_LM"}  # without it PEFT calls the model past the place where it adds the penalty
    model = get_peft_model(tiny(kind), AdaLoraConfig(lora_alpha=ALPHA, **budget, **smoothing, **places))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def in_ours(kind: str, theirs: PeftModel) -> nn.Module:
    """The model with our layers, their numbers as PEFT's."""
    model = tiny(kind)
    inject(model, TARGETS[kind], lambda base: adalora_layer(base, r=R, alpha=ALPHA))
    copy_from_peft(pairs(model, theirs, PEFT_NAMES))
    return model.eval()


@pytest.fixture(params=TARGETS)
def kind(request):
    return request.param


@pytest.fixture
def both(kind):
    theirs = in_peft(kind)
    return in_ours(kind, theirs), theirs


def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def backward(model: nn.Module, penalty=None) -> torch.Tensor:
    """Gradients of a loss; the logits and it. PEFT adds its penalty to a loss that the model itself computes."""
    out = model(input_ids=TOKENS, labels=TOKENS)
    loss = out.loss if penalty is None else out.loss + penalty()
    loss.backward()
    return torch.cat([out.logits.detach().flatten(), loss.detach()[None]])


def test_outputs_and_gradients_with_the_penalty_before_and_after_three_steps(both):
    ours, theirs = both
    named = pairs(ours, theirs, PEFT_NAMES)
    assert_same_training(named, lambda: (backward(ours, lambda: 0.3 * orthogonality(ours)), backward(theirs)))


@pytest.mark.parametrize("delta_t", [1, 3])
def test_the_same_triplets_are_pruned_over_a_whole_schedule(kind, delta_t):
    theirs = in_peft(kind, delta_t)
    ours = in_ours(kind, theirs)
    schedule = RankSchedule(
        target_r=TARGET_R, n_steps=N_STEPS, t_init=T_INIT, t_final=T_FINAL, delta_t=delta_t, beta1=0.7, beta2=0.6
    )
    allocator, named, left = RankAllocator(ours, schedule), pairs(ours, theirs, PEFT_NAMES), set()
    for number in range(1, N_STEPS + 1):
        for mine, its in named.values():  # the same gradients, and the same steps, to the bit
            its.grad = torch.randn_like(its)
            mine.grad = its.grad.view_as(mine).clone()
            for p in (mine, its):
                p.data -= 0.05 * p.grad
        allocator.step(number)
        theirs.base_model.update_and_allocate(number)
        for name, (mine, its) in named.items():
            assert torch.equal(mine, its.view_as(mine)), (number, name)
        left.add(sum(int((layer.E != 0).sum()) for layer in adalora_layers(ours).values()))
    n_layers = len(adalora_layers(ours))
    assert len(left) > 3  # it went down in steps
    assert min(left) == TARGET_R * n_layers
    pattern = theirs.peft_config["default"].rank_pattern
    assert {name: layer.kept.tolist() for name, layer in adalora_layers(ours).items()} == {
        key.removesuffix(".lora_E.default"): kept for key, kept in pattern.items()
    }


def prune(ours: nn.Module, theirs: PeftModel) -> None:
    """What a schedule leaves: uneven ranks, and a layer without any."""
    generator, pattern = torch.Generator().manual_seed(3), {}
    for place, (name, layer) in enumerate(adalora_layers(ours).items()):
        layer.prune(torch.rand(R, generator=generator) < (0 if place == 1 else 0.5))
        pattern[f"{name}.lora_E.default"] = layer.kept.tolist()
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)


@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
@torch.no_grad()
def test_files_go_both_ways(both, kind, is_pruned, tmp_path):
    ours, theirs = both
    if is_pruned:
        prune(ours, theirs)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), **CLOSE)
    bases = tiny(kind), tiny(kind)
    here = assert_files_go_both_ways(ours, theirs, tmp_path, save_adalora, load_adalora, logits_of, bases)
    assert rank_report(here) == rank_report(ours)
    mine, its = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert mine.get("rank_pattern") == its["rank_pattern"]
    assert {key for key in mine if mine[key] != its[key]} <= {"target_modules", "total_step"}


@torch.no_grad()
def test_peft_opens_what_is_left_as_a_plain_lora(both, kind, tmp_path):
    ours, theirs = both
    prune(ours, theirs)
    expected = logits_of(theirs)
    report = to_lora(ours)
    torch.testing.assert_close(logits_of(ours), expected, **CLOSE)
    save_adapter(ours, tmp_path)
    there = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    torch.testing.assert_close(logits_of(there), expected, **CLOSE)
    ranks = {name: len(p) for name, p in there.named_parameters() if name.endswith("lora_A.default.weight")}
    assert {name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight") for name in ranks} == {
        name for name, (rank, _) in report.ranks.items() if rank
    }
    assert sorted(ranks.values()) == sorted(rank for rank, _ in report.ranks.values() if rank)


@torch.no_grad()
def test_merging_gives_what_pefts_merging_does(both):
    ours, theirs = both
    weights = dict(theirs.merge_and_unload().named_parameters())
    for name, layer in adalora_layers(ours).items():
        torch.testing.assert_close(layer.merged_weight(torch.float32), weights[f"{name}.weight"], **CLOSE)
