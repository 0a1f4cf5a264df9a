"""06 · Init, alpha, scaling: rsLoRA, LoRA+

What needs PEFT.
"""

import peft
from torch import nn

from minilora.classroom.claims import MATHEMATICS, Claim, Finding


def lora_plus_scale() -> Finding:
    """Its configuration, made."""
    try:
        config = peft.LoraConfig(r=16, lora_alpha=32, lora_plus_scale=16)
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
        found, runs = "it is accepted", True
    except TypeError as error:
        found, runs = f"TypeError: {error}", False
    return Finding(
        cases=runs,
        found=f"PEFT {peft.__version__}: {found}; LoRA+ is its create_loraplus_optimizer(loraplus_lr_ratio=16)",
    )


CLAIMS = [
    Claim(
        id="06.lora-plus-scale",
        fact="LoraConfig(lora_plus_scale=16) gives B 16 times A's rate.",
        source=f"{MATHEMATICS}, “LoRA+ - Better Learning Rate Scheduling”",
        settle=lora_plus_scale,
        verdict="does not hold",
    ),
]
