"""How a model is trained: the method, its settings, and what it trains. No weights, no torch.

    full                every parameter is trained
    galore              the same, and the moments of a layer's matrices are of their projected gradients, of rank r
    lora                A and B of rank r are trained, in fp32, beside the frozen model
    dora                and a magnitude for each output, beside the squared length of each row of the frozen weight
    adalora             and r singular values for each matrix, beside two running means of how much each number matters
    pissa, olora        A and B, beside the A0 and B0 at which they began
    qlora, loftq        A and B over linear layers of 4.127 bits a weight; embeddings, head and norms stay as they are
    ia3                 a factor for each key, each value, and each input of a layer's last matrix
    houlsby             two small networks a layer, of `bottleneck` numbers in the middle
    prefix, prompt      `n_virtual` tokens before the text: their keys and values in every layer, or their embeddings

Read before this file: sizes.
"""

from dataclasses import dataclass

from minilora.llm.architectures import (
    ALL_LINEAR,
    NAMES,
    Architecture,
    Linear,
    Shape,
    layer_linears,
    linears,
    match_targets,
    parameter_shapes,
)
from minilora.llm.sizes import (
    OPTIMIZERS,
    adalora_shapes,
    adapter_shapes,
    check_count,
    count,
    houlsby_shapes,
    ia3_vectors,
    known,
    prefix_shapes,
    width_bytes,
)

LOW_RANK = ("lora", "dora", "qlora", "adalora", "pissa", "olora", "loftq")  # A and B beside the matrices of `targets`
VIRTUAL = ("prefix", "prompt")
METHODS = ("full", *LOW_RANK, "ia3", "houlsby", *VIRTUAL, "galore")
USED_BY = {  # settings that some methods alone have a use for
    "r": (*LOW_RANK, "galore"),
    "start_r": ("adalora",),
    "targets": LOW_RANK,
    "bottleneck": ("houlsby",),
    "n_virtual": VIRTUAL,
    "mlp_features": ("prefix",),
    "master_weights": ("full",),
}


def default_r(method: str) -> int:
    """The rank of A and B, or of GaLore's projection, where none is given."""
    return 128 if method == "galore" else 16


def default_start_r(r: int) -> int:
    """AdaLoRA's rank at the start, where r is what its layers shall have on average at the end: 1.5 r."""
    return -(-3 * r // 2)


def default_dtype(method: str) -> str:
    """The dtype of the weights: bf16 under an adapter, fp32 where they train themselves."""
    return "fp32" if method in ("full", "galore") else "bf16"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained, as `minilora train` would. What a method has no use for, it does not look at.

    Raises:
        ValueError: for an unknown name, a number below 1, or two settings that exclude each other.
    """

    method: str = "lora"
    r: int | None = None  # of A and B, and of GaLore's projection; None: default_r
    start_r: int | None = None  # AdaLoRA's at the start; None: default_start_r
    targets: str | tuple[str, ...] = ALL_LINEAR  # of the methods with A and B
    bottleneck: int = 64  # of houlsby
    n_virtual: int = 20  # tokens of prefix and prompt
    mlp_features: int | None = None  # of the network that makes a prefix while it trains, if there is one
    dtype: str | None = None  # of weights and arithmetic, None: default_dtype; an adapter is fp32 always
    optimizer: str = "adamw"
    batch: int = 1
    seq: int = 512  # tokens in a row of the batch
    checkpointing: bool = False  # keep each layer's input only, and compute the layer again in the backward pass
    master_weights: bool = True  # full training in 16 bits updates an fp32 copy of the weights

    def __post_init__(self) -> None:
        known("method", self.method, METHODS)
        known("optimizer", self.optimizer, OPTIMIZERS)
        width_bytes(self.weights_dtype)
        for name in ("r", "bottleneck", "n_virtual", "mlp_features", "batch", "seq"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.method == "adalora" and self.first_r < self.asked_r:
            raise ValueError(f"start_r is {self.start_r}: choose a whole number from r, {self.asked_r}, on")
        if self.method == "prefix" and self.checkpointing:
            raise ValueError(
                "prefix tuning cannot compute a layer again: its gradients would not reach the prefix; leave "
                "checkpointing out, or choose prompt"
            )
        if self.method == "galore" and self.optimizer != "adamw":
            raise ValueError(f"galore is an AdamW of its own: its optimizer is adamw, not {self.optimizer}")

    @property
    def trains_all(self) -> bool:
        """Whether every parameter of the model is trained, and there is no adapter."""
        return self.method in ("full", "galore")

    @property
    def is_low_rank(self) -> bool:
        """Whether A and B are trained."""
        return self.method in LOW_RANK

    @property
    def is_in_4_bits(self) -> bool:
        return self.method in ("qlora", "loftq")

    @property
    def asked_r(self) -> int:
        """The rank that was asked for, or the method's own."""
        return default_r(self.method) if self.r is None else self.r

    @property
    def first_r(self) -> int:
        """The rank at the start, of A and B and of GaLore's projection: of AdaLoRA more than was asked for."""
        if self.method != "adalora":
            return self.asked_r
        return default_start_r(self.asked_r) if self.start_r is None else self.start_r

    @property
    def run_r(self) -> int:
        """The rank of the product beside each matrix: of PiSSA and OLoRA, which subtract their start, 2r."""
        return 2 * self.first_r if self.method in ("pissa", "olora") else self.first_r

    @property
    def weights_dtype(self) -> str:
        """The dtype of the weights."""
        return self.dtype or default_dtype(self.method)

    @property
    def n_tokens(self) -> int:
        """Tokens of text."""
        return self.batch * self.seq

    @property
    def n_read_tokens(self) -> int:
        """Tokens that go through the layers: those of a prompt too, and not those of a prefix."""
        return self.batch * (self.seq + (self.n_virtual if self.method == "prompt" else 0))

    @property
    def width_bytes(self) -> int:
        """Bytes of one number in the weights and activations."""
        return width_bytes(self.weights_dtype)


def trained_shapes(arch: Architecture, setup: Setup) -> list[Shape]:
    """The shape of every tensor that is trained.

    Raises:
        ValueError: if a target hits nothing.
    """
    if setup.trains_all:
        return list(parameter_shapes(arch).values())
    if setup.method == "adalora":
        return adalora_shapes(arch, setup.first_r, setup.targets)
    if setup.is_low_rank:
        return list(adapter_shapes(arch, setup.first_r, setup.targets, setup.method == "dora").values())
    if setup.method == "ia3":
        return [(n,) for _ in range(arch.n_layers) for n in ia3_vectors(arch).values()]
    if setup.method == "houlsby":
        return houlsby_shapes(arch, setup.bottleneck)
    if setup.method == "prompt":
        return [(setup.n_virtual, arch.hidden)]
    return prefix_shapes(arch, setup.n_virtual, setup.mlp_features or 0)


def trained_params(arch: Architecture, setup: Setup) -> int:
    """Count what is trained.

    Raises:
        ValueError: as trained_shapes.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> trained_params(ARCHITECTURES["llama-2-7b"], Setup(method="prefix", n_virtual=20))
    5242880
    """
    return count(trained_shapes(arch, setup))


def trained_by_layer(arch: Architecture, setup: Setup) -> list[list[Linear]]:
    """For each decoder layer, those of its matrices that are trained or have A and B.

    Raises:
        ValueError: as trained_shapes.
    """
    hit: dict[str, Linear] = {}
    if setup.trains_all:
        hit = linears(arch)
    elif setup.is_low_rank:
        hit = match_targets(arch, setup.targets)
    prefix, one_layer = NAMES[arch.family].layer, layer_linears(arch)
    return [[linear for linear in one_layer if f"{prefix}.{n}.{linear.name}" in hit] for n in range(arch.n_layers)]
