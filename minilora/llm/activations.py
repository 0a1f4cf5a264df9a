"""What waits for the backward pass: an estimate of its bytes, as a sum of named terms. No weights, no torch.

The terms are the tensors that autograd keeps of each layer: for Llama what llm/autograd keeps on a CPU (on CUDA the
norms' results too, 2 · hidden numbers a token), for GPT-2 what transformers' layers do. Assumed: attention that does
not store its scores (torch's scaled_dot_product_attention, or ours), no dropout, products in the dtype of the weights.

In 4 bits one weight at a time is made whole, in that dtype; on a processor that multiplies float32 faster (cpu/wide) it
is float32, twice as large where the dtype has 16 bits.

A matrix keeps its input only if it is trained or has an adapter that asks for it: to send a gradient through a frozen
one takes its weight alone.

Read before this file: setup.
"""

from collections.abc import Collection

from minilora.llm.architectures import Architecture, Linear, layer_linears
from minilora.llm.setup import Setup, trained_by_layer
from minilora.llm.sizes import ia3_vectors

KEPT_ANYHOW = ("v_proj", "gate_proj", "up_proj")  # whose results the backward of attention and of SwiGLU asks for
LOSS_CHUNK_TOKENS = 256  # whose logits the loss makes at a time: 25 MB of bf16 for SmolLM2; more is no faster


def activation_terms(arch: Architecture, setup: Setup) -> dict[str, int]:
    """The bytes that wait for the backward pass, by kind of tensor, for the whole batch and all layers.

    With checkpointing: the input of every layer, and all of one layer, the one that is being computed again. Where that
    one is smaller than the loss's chunk, which has gone by then, it adds nothing.
    """
    layers = [saved_in_layer(arch, setup, trained) for trained in trained_by_layer(arch, setup)]
    if setup.checkpointing:
        layers = [max(layers, key=lambda terms: sum(terms.values()))]
    terms = {name: sum(layer[name] for layer in layers) for name in layers[0]}
    if setup.is_in_4_bits:
        largest = max(linear.n_weights for linear in layer_linears(arch))
        terms["one weight at a time, out of 4 bits"] = largest * setup.width_bytes
    if setup.checkpointing:
        if sum(terms.values()) <= sum(logit_terms(arch, setup).values()):
            terms = {}
        inputs = arch.n_layers * setup.n_read_tokens * arch.hidden * setup.width_bytes
        terms["checkpoints: input of each layer"] = inputs
    return {name: n_bytes for name, n_bytes in terms.items() if n_bytes}


def saved_in_layer(arch: Architecture, setup: Setup, trained: Collection[Linear]) -> dict[str, int]:
    """Bytes that autograd keeps of one layer, of which these matrices are trained or have A and B."""
    per_token = {
        **saved_by_model(arch, setup),
        "inputs of trained matrices": saved_inputs(arch, setup, trained) * setup.width_bytes,
        **saved_by_adapters(arch, setup, trained),
    }
    terms = {name: setup.n_read_tokens * n_bytes for name, n_bytes in per_token.items()}
    terms["adapters: made of their weights for the step"] = made_for_step(arch, setup, trained)
    if setup.method == "prefix":
        keys_and_values = 2 * arch.n_kv_heads * arch.head_dim * setup.n_virtual
        mask = setup.seq * (setup.n_virtual + setup.seq)
        terms["prefix: its keys and values"] = setup.batch * keys_and_values * setup.width_bytes
        terms["attention: mask, which the prefix asks for"] = setup.batch * mask * setup.width_bytes
    return terms


def saved_by_model(arch: Architecture, setup: Setup) -> dict[str, int]:
    """Bytes for each token that one layer of the model keeps, whatever is trained in it."""
    n_bytes, i = setup.width_bytes, arch.intermediate
    q, kv = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    if arch.family == "llama":
        norms = {"norms: input, and a scale in fp32": 2 * (arch.hidden * n_bytes + 4)}
        mlp = {"mlp: gate and up": 2 * i * n_bytes}
    else:
        norms = {"norms: input, mean and deviation": 2 * (arch.hidden + 2) * n_bytes}
        mlp = {"mlp: four steps of gelu": 4 * i * n_bytes}
    by_hand = arch.family == "llama" and n_bytes <= 2 and setup.method != "prefix"  # from q, k and v alone
    return {
        **norms,
        "attention: q, k, v": (q + 2 * kv) * n_bytes,
        "attention: output and log-sum": 0 if by_hand else q * n_bytes + 4 * arch.n_heads,
        **mlp,
    }


def saved_inputs(arch: Architecture, setup: Setup, trained: Collection[Linear]) -> int:
    """Numbers for each token: the inputs of one layer's trained matrices, those that the model does not keep itself."""
    inputs = {linear.reads: linear.in_features for linear in trained}
    if arch.family == "gpt2":
        inputs.pop("attention output", None)  # a view of what attention keeps; Llama's is a copy, head after head
    elif not setup.trains_all:  # a LoRA layer has a norm's result, or swiglu's, made again
        inputs = {name: features for name, features in inputs.items() if name == "attention output"}
    return sum(inputs.values())


def saved_by_adapters(arch: Architecture, setup: Setup, trained: Collection[Linear]) -> dict[str, int]:
    """Bytes for each token that the adapters of one layer keep."""
    n_bytes = setup.width_bytes
    if setup.is_low_rank:
        of_dora = [y.out_features for y in trained if y.name.rpartition(".")[2] not in KEPT_ANYHOW]
        return {
            "adapters: x Aᵀ": len(trained) * setup.run_r * n_bytes,
            "DoRA: results that nothing else keeps": sum(of_dora) * n_bytes if setup.method == "dora" else 0,
        }
    if setup.method == "ia3":
        return {"IA³: what is scaled, as it was before": sum(ia3_vectors(arch).values()) * n_bytes}
    if setup.method == "houlsby":
        h_u = arch.hidden + 2 * setup.bottleneck
        return {"adapters: h, and the bottleneck before and after f": 2 * h_u * n_bytes}
    return {}


def made_for_step(arch: Architecture, setup: Setup, trained: Collection[Linear]) -> int:
    """Bytes, whatever the tokens: tensors that the adapters of one layer make of what they train, and keep."""
    if setup.method == "dora":  # the lengths ‖V‖, and g
        return sum(2 * 4 * linear.out_features for linear in trained)
    if setup.method == "adalora":  # P Λ
        return sum(4 * linear.out_features * setup.first_r for linear in trained)
    if setup.method in ("pissa", "olora"):  # [A − A0; A0] and [B, B − B0]
        return sum(4 * linear.lora_params(setup.run_r) for linear in trained)
    if setup.method == "houlsby" and setup.width_bytes < 4:  # W_down and W_up in the dtype of h
        return 2 * 2 * arch.hidden * setup.bottleneck * setup.width_bytes
    return 0


def logit_terms(arch: Architecture, setup: Setup) -> dict[str, int]:
    """The bytes at the loss, which makes the logits of LOSS_CHUNK_TOKENS tokens at a time."""
    n = min(setup.n_tokens, LOSS_CHUNK_TOKENS) * arch.vocab
    terms = {f"logits in {setup.weights_dtype}": n * setup.width_bytes}
    if setup.trains_all:
        terms["gradient of the head in fp32, and scaled"] = 2 * arch.vocab * arch.hidden * 4
    return terms
