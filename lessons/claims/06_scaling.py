"""06 · Init, alpha, scaling: rsLoRA, LoRA+

What this lesson's claims leave to measure.
"""

from minilora.classroom.claims import FAMILY, Unsettled

UNSETTLED = [
    Unsettled(
        id="06.loraplus-speed",
        fact="LoRA+ converges 1.5 to 2 times sooner.",
        source=f"{FAMILY}, on LoRA+",
        needs="the steps that LoRA and LoRA+ take to one and the same loss, each at its best rate, several seeds; its "
        "paper (arXiv 2402.12354) says up to 2 times",
    ),
]
