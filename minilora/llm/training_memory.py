"""The memory of a training step, part by part. No weights, no torch.

    weights + adapter + gradients + optimizer + master + activations + logits = total

What is exact: the weights, the adapter, the gradients and the optimizer's state. What is an estimate: activations and
logits (llm/activations). On SmolLM2-135M the sum is within a tenth of the bytes that are alive in a step of each method
(tests/train/test_memory.py).

What is left out: the device's own context (0.3 to 0.8 GB on CUDA), the allocator's gaps, and the temporary tensors of
single operations: for those and for what is estimated, leave the sum a MARGIN.

Read before this file: setup, activations.
"""

from dataclasses import dataclass, fields

from minilora.llm.activations import activation_terms, logit_terms
from minilora.llm.architectures import Architecture, linears, match_targets, parameter_shapes
from minilora.llm.setup import VIRTUAL, Setup, trained_shapes
from minilora.llm.sizes import count, galore_bytes, lora_params, optimizer_bytes, weight_bytes

MARGIN = 1.1  # times the total: for the estimated parts and the allocator's gaps


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """The memory of a training step, in bytes. Activations and logits are estimates; the rest is exact."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    master: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def training_bytes(arch: Architecture, setup: Setup) -> TrainingBytes:
    """Add up the memory of one training step.

    This is the peak where a batch goes through in parts: then the gradients are there while activations fill. In one
    part gradients fill while activations empty, and where all weights train the peak lies below the sum.

    Raises:
        ValueError: if a target hits nothing, or the sequence is longer than the model's positions.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> training_bytes(ARCHITECTURES["llama-2-7b"], Setup(method="full")).optimizer / 6738415616
    8.0
    """
    check_positions(arch, setup)
    n_trained = count(trained_shapes(arch, setup))
    has_master = setup.method == "full" and setup.master_weights and setup.width_bytes < 4
    return TrainingBytes(
        weights=weight_bytes(arch, setup.weights_dtype, setup.is_in_4_bits),
        adapter=0 if setup.trains_all else 4 * n_trained + bytes_beside_adapter(arch, setup),
        gradients=n_trained * (setup.width_bytes if setup.trains_all else 4),
        optimizer=state_bytes(arch, setup),
        master=4 * n_trained if has_master else 0,
        activations=sum(activation_terms(arch, setup).values()),
        logits=sum(logit_terms(arch, setup).values()),
    )


def state_bytes(arch: Architecture, setup: Setup) -> int:
    """The bytes of what the optimizer keeps. GaLore projects the matrices of the layers, as its authors do."""
    if setup.method != "galore":
        return optimizer_bytes(trained_shapes(arch, setup), setup.optimizer)
    matrices = linears(arch)
    others = [shape for name, shape in parameter_shapes(arch).items() if name.removesuffix(".weight") not in matrices]
    return galore_bytes(matrices.values(), others, setup.first_r)


def bytes_beside_adapter(arch: Architecture, setup: Setup) -> int:
    """Bytes that a method keeps in fp32 beside what it trains, for as long as it trains."""
    if setup.method == "dora":  # the squared length of each row
        return 4 * sum(linear.out_features for linear in match_targets(arch, setup.targets).values())
    if setup.method in ("pissa", "olora"):  # A0 and B0
        return 4 * lora_params(arch, setup.first_r, setup.targets)
    if setup.method == "adalora":  # the running means Ī and Ū of each number's importance; a byte a triplet: it stays
        return 2 * 4 * count(trained_shapes(arch, setup)) + setup.first_r * len(match_targets(arch, setup.targets))
    return 0


def check_positions(arch: Architecture, setup: Setup) -> None:
    """
    Raises:
        ValueError: if a row has more tokens than the model has positions.
    """
    n_virtual = setup.n_virtual if setup.method in VIRTUAL else 0
    if arch.n_positions and setup.seq + n_virtual > arch.n_positions:
        with_them = f", with {n_virtual} virtual ones before it," if n_virtual else ""
        raise ValueError(
            f"a sequence of {setup.seq} tokens{with_them} is too long: this model has {arch.n_positions} positions"
        )
