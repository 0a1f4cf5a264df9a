"""What articles say a training takes, settled by adding up their own parts and by the package's count."""

from minilora.classroom.claims import FAMILY, MATHEMATICS, REVOLUTION, STICKY_NOTE, Claim, Finding
from minilora.classroom.pictures.bill import GB, static_bytes
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import Setup
from minilora.llm.training_memory import training_bytes


def table_of_fp32() -> Finding:
    """Weights, gradients and Adam's moments in float32, for 7, 13 and 70 billion parameters."""
    quoted = {7: 28 + 28 + 56, 13: 52 + 52 + 104, 70: 280 + 280 + 560}
    found = {n: static_bytes(n * 10**9, weight=4, gradient=4, moment=4, master=0) / GB for n in quoted}
    told = ", ".join(f"{n}B {size:,.0f} GB" for n, size in found.items())
    return Finding(cases=found == quoted, found=f"16 bytes a parameter: {told}")


def hidden_states() -> Finding:
    """The hidden state after each of 32 layers, for 4 texts of 2,048 tokens, beside all that waits for the backward."""
    arch = ARCHITECTURES["llama-2-7b"]
    states = arch.n_layers * 4 * 2048 * arch.hidden * 4 / GB
    found = training_bytes(arch, Setup(method="full", dtype="fp32", batch=4, seq=2048))
    everything = (found.activations + found.logits) / GB
    return Finding(
        cases={"all that waits for the backward": 50 <= everything <= 100, "the hidden states": 50 <= states <= 100},
        found=f"4 texts of 2,048 tokens in float32: hidden states {states:.1f} GB, all of it {everything:.0f} GB",
    )


def two_moments_of_70b() -> Finding:
    """float16 weights and two float32 moments."""
    parts = 70 * 10**9 * (2 + 2 * 4) / GB
    return Finding(
        cases=parts <= 280, found=f"2 + 4 + 4 bytes a parameter are {parts:,.0f} GB; 280 are float32 weights alone"
    )


def fp32_of_70b() -> Finding:
    """Weights, gradients and moments in float32."""
    parts = static_bytes(70 * 10**9, weight=4, gradient=4, moment=4, master=0) / GB
    moments = 70 * 10**9 * 2 * 4 / GB
    return Finding(
        cases=parts <= 560, found=f"16 bytes a parameter are {parts:,.0f} GB; {moments:,.0f} are the moments alone"
    )


def updating_140_gb() -> Finding:
    """What of a training in float16 the figure covers."""
    weights, least = 70 * 2, 70 * (2 + 2 + 8)
    return Finding(
        cases={"the weights alone": weights <= 140, "with gradients and moments": least <= 140},
        found=f"weights {weights} GB; with float16 gradients and float32 moments {least} GB",
    )


CLAIMS = [
    Claim(
        id="01.fp32-table",
        fact="In fp32 with Adam, weights, gradients and optimizer take 28 + 28 + 56 GB for 7B, 52 + 52 + 104 for 13B, "
        "280 + 280 + 560 for 70B.",
        source=REVOLUTION,
        settle=table_of_fp32,
        verdict="holds",
    ),
    Claim(
        id="01.activations",
        fact="A 7B model's activations take 50 to 100 GB: the hidden states of its 32 layers.",
        source=REVOLUTION,
        settle=hidden_states,
        verdict="holds when",
    ),
    Claim(
        id="01.280-gb",
        fact="70B parameters in fp16 and AdamW's two moments in fp32 take about 280 GB.",
        source=STICKY_NOTE,
        settle=two_moments_of_70b,
        verdict="does not hold",
    ),
    Claim(
        id="01.560-gb",
        fact="Weights, gradients and optimizer states of 70B in FP32 take about 560 GB.",
        source=MATHEMATICS,
        settle=fp32_of_70b,
        verdict="does not hold",
    ),
    Claim(
        id="01.140-gb",
        fact="Full fine-tuning of a 70B model updates 140 GB of parameters in fp16.",
        source=FAMILY,
        settle=updating_140_gb,
        verdict="holds when",
    ),
]
