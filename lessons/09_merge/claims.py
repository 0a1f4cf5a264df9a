"""What articles say about merging, each against a merge. Those that need PEFT stand last, and begin with 09.peft."""

import importlib.util

import numpy as np
import torch
from torch import nn

from minilora.classroom.claims import FAMILY, MATHEMATICS, REVOLUTION, Claim, Finding
from minilora.classroom.exercises import find_exercise
from minilora.classroom.merging import FORMATS, random_layer, to_bfloat16
from minilora.numpy_lora.forward import lora_forward, merge, unmerge
from minilora.torch_lora import LoRALinear


def subtract_BA() -> Finding:
    """Merge, then subtract B A, with a scaling of 1 and another."""
    W, A, B = random_layer(64, 3)
    left = {name: merge(W, A, B, alpha) - B @ A for name, alpha in {"alpha = r": 3.0, "alpha ≠ r": 8.0}.items()}
    return Finding(
        cases={name: bool(np.allclose(found, W, rtol=0, atol=1e-12)) for name, found in left.items()},
        found="what was added is (alpha / r) · B A; taking out B A leaves (alpha / r − 1) · B A in the weight",
    )


def irreversible() -> Finding:
    """Three ways back."""
    W, A, B = random_layer(64, 3)
    delta = 0.1 * B @ A
    stored = to_bfloat16(W)
    subtracted = to_bfloat16(to_bfloat16(stored + delta) - delta)
    linear = nn.Linear(64, 64, bias=False).bfloat16()
    linear.weight.data = torch.from_numpy(stored).bfloat16()
    with find_exercise("09.3").reference(linear, torch.from_numpy(delta).float()):
        pass
    return Finding(
        cases={
            "W is in bfloat16 and ΔW is subtracted": not np.array_equal(subtracted, stored),
            "W is in float64 and ΔW is subtracted": not np.allclose(unmerge(merge(W, A, B, 8.0), A, B, 8.0), W),
            "W was kept": not np.array_equal(linear.weight.detach().float().numpy(), stored),
        },
        found=f"in bfloat16, {np.mean(subtracted != stored):.1%} of the weights come back different; "
        "kept, all come back",
    )


def absolute_tolerance() -> Finding:
    """A right merge, and two that are wrong, of an adapter as small as many are."""
    W, A, B = random_layer(256, 8)
    B, alpha = 4e-4 * B, 16.0  # s = 2
    x = np.random.default_rng(1).normal(size=(4, 256))
    live, base = lora_forward(x, W, A, B, alpha), x @ W.T
    attempts = {  # a merged output, and whether it should pass
        "the merge is right": (x @ merge(W, A, B, alpha).T, True),
        "alpha / r was forgotten": (x @ (W + B @ A).T, False),
        "the adapter was left out": (base, False),
    }
    same = find_exercise("09.2").reference  # against the size of the adapter's effect
    assert [same(out, live, base, 0.05) for out, _ in attempts.values()] == [True, False, False]
    return Finding(
        cases={name: np.allclose(out, live, atol=1e-3) == should for name, (out, should) in attempts.items()},
        found="all three pass: with or without it, this adapter does not move any output by 0.001",
    )


def no_extra_memory() -> Finding:
    """Bytes of a fused weight, and of a merged one that can be taken apart again."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 64, bias=False), r=3, alpha=8)
    n_bytes, fused_bytes = layer.base.weight.nbytes, layer.fused().weight.nbytes
    layer.merge()
    return Finding(
        cases={
            "the merge is final, as in fused()": fused_bytes == n_bytes,
            "W is kept, to be put back exactly": layer.base.weight.nbytes + layer.unmerged_weight.nbytes == n_bytes,
        },
        found=f"fused: {fused_bytes:,} bytes, as before; merged and ready to unmerge: {2 * n_bytes:,}",
    )


def merge_then_quantize() -> Finding:
    """NF4 of the merged weight, and the adapter beside NF4 of the base, against the exact merge."""
    W, A, B = random_layer(512, 16)
    delta, nf4 = 0.03 * B @ A, FORMATS["NF4"]
    both = (nf4(W + delta), nf4(W) + delta)
    distance = [float(np.linalg.norm(weight - (W + delta)) / np.linalg.norm(W)) for weight in both]
    lost = [float(np.linalg.norm(weight - nf4(W) - delta) / np.linalg.norm(delta)) for weight in both]
    return Finding(
        cases={
            "measured by the distance from the exact merge": distance[0] < 0.99 * distance[1],
            "measured by what is lost of the adapter's effect": lost[0] < lost[1],
        },
        found=f"NF4, ‖ΔW‖/‖W‖ = 3 %: distance {distance[0]:.4f} against {distance[1]:.4f}, "
        f"error / effect {lost[0]:.2f} against {lost[1]:.2f}; of weights, not of a whole model's answers",
    )


def vacuous_check() -> Finding:
    """A merge that destroys the weight, and the check after it."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(256, 256, bias=False)), config)
    x = torch.randn(4, 256)
    with torch.no_grad():
        merged_model = model.merge_and_unload()
        merged_model[0].weight.zero_()  # a merge that destroyed everything
        finds_out = not torch.allclose(model(x), merged_model(x), atol=1e-3)
    return Finding(
        cases=finds_out,
        found="the merged weight was set to zero, and the two agree: merge_and_unload() changed the model in place "
        f"(PEFT {peft.__version__})",
    )


def merge_module() -> Finding:
    """Whether Python finds such a module."""
    import peft

    return Finding(
        cases=importlib.util.find_spec("peft.merge_and_unload") is not None,
        found=f"PEFT {peft.__version__} has no such module; merge_and_unload() is a method of the model",
    )


CLAIMS = [
    Claim(
        id="09.merge-subtract-BA",
        fact="Merging is reversible: subtract B A from W′ and you have W again.",
        source=f"{REVOLUTION}, “Merging: Zero-Cost Inference”",
        settle=subtract_BA,
        verdict="holds when",
    ),
    Claim(
        id="09.merge-irreversible",
        fact="Merging is irreversible. You cannot unmerge.",
        source=f"{MATHEMATICS}, “LoRA Weight Merging - The Math”",
        settle=irreversible,
        verdict="holds when",
    ),
    Claim(
        id="09.merge-absolute-tolerance",
        fact="assert torch.allclose(out_live, out_merged, atol=1e-3) tells whether a merge is right.",
        source=f"{MATHEMATICS}, “LoRA Weight Merging - The Math”",
        settle=absolute_tolerance,
        verdict="holds when",
    ),
    Claim(
        id="09.merge-no-extra-memory",
        fact="After merging the weight has the dimensions of the original, and there is no extra memory.",
        source=f"{REVOLUTION}, “Merging: Zero-Cost Inference”",
        settle=no_extra_memory,
        verdict="holds when",
    ),
    Claim(
        id="09.merge-then-quantize",
        fact="Merge first, then quantize: that is better than a quantized base with the adapter beside it.",
        source=f"{FAMILY}, a note on GGUF",
        settle=merge_then_quantize,
        verdict="does not hold",
    ),
    Claim(
        id="09.peft-vacuous-check",
        fact="Compare the adapter model with the merged one after merge_and_unload(): if they agree, it is right.",
        source=f"{MATHEMATICS}, “LoRA Weight Merging - The Math”",
        settle=vacuous_check,
        verdict="does not hold",
    ),
    Claim(
        id="09.peft-merge-module",
        fact="python -m peft.merge_and_unload merges an adapter on the command line.",
        source=f"{FAMILY}, its commands for GGUF",
        settle=merge_module,
        verdict="does not hold",
    ),
]
