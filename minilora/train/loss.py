"""Cross-entropy that never holds the logits of all tokens at once.

    n         tokens that carry loss       vocab    49,152 for SmolLM2
    hidden    (n, hidden)                  W        (vocab, hidden), the head's weight

    loss  = − mean over i of log p(target[i]),     p = softmax(logits),  logits = hidden Wᵀ
    dloss/dhidden = (p − one-hot(target)) W / n        dloss/dW = (p − one-hot(target))ᵀ hidden / n

Written plainly, the logits, their float32 copy, its softmax and its gradient are alive together: 14 bytes · n · vocab
in bfloat16, 0.7 GiB for 1,024 tokens, more than all weights of the model. Here a chunk of tokens goes through at a
time, its logits turn into their gradient where they lie, and what is kept is as large as `hidden`.

Read before: train/data. Read next: train/trainer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.cpu import Linear
from minilora.cpu.products import linear, product
from minilora.llm.activations import LOSS_CHUNK_TOKENS
from minilora.llm.model import Transformer
from minilora.train.data import IGNORED, Batch

LEAST_SHARE_SAVED = 1 / 16  # of a batch's tokens: what lays the rows together and apart costs about 3 % of a step
ROWS_AT_ONCE = 8  # made float32 at a time: 1.5 MB for SmolLM2's vocabulary


def loss_of(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy in nats per token that carries loss, in float32 or wider.

        loss = − mean over labelled i of log p(token[i] | token[0..i−1])

    The vocabulary product is the widest of the model, so it is formed only at the positions that carry loss: the hidden
    state at i − 1 predicts the token at i. Of a plain linear head the weight alone is used; its hooks do not run.
    Where all rows begin alike, a hook within the decoder sees them joined into one: llm/prefix.
    """
    device = next(model.parameters()).device
    targets = batch.labels[:, 1:].to(device)
    labelled = targets != IGNORED
    tokens, transformer = batch.tokens.to(device), model.get_submodule("model")
    positions, mask = batch.positions, batch.mask
    if positions is not None and mask is not None:
        hidden = transformer(tokens, positions=positions.to(device), mask=mask.to(device))
    else:
        hidden = transformer(tokens, shared=batch.shared) if shares_prefix(model, batch) else transformer(tokens)
    hidden = hidden[:, :-1]  # (batch, seq - 1, hidden)
    hidden, targets, head = hidden[labelled], targets[labelled], model.get_submodule("lm_head")
    if type(head) in (nn.Linear, Linear) and head.bias is None:
        return chunked_cross_entropy(hidden, head.weight, targets)
    logits = head(hidden)  # the head has an adapter, or a bias
    return F.cross_entropy(logits.to(_wide(logits.dtype)), targets)


def shares_prefix(model: nn.Module, batch: Batch) -> bool:
    """Whether the tokens with which all rows begin are computed once: where it saves enough, and nothing is dropped."""
    if not isinstance(model.get_submodule("model"), Transformer):
        return False
    saved = batch.shared * (len(batch.tokens) - 1)
    return saved >= LEAST_SHARE_SAVED * batch.tokens.numel() and not any(map(drops, model.modules()))


def drops(module: nn.Module) -> bool:
    """Whether a module sets numbers, chosen at random, to zero now; its rate is named as in torch, or as in a layer."""
    rates = (getattr(module, name, 0.0) for name in ("p", "dropout"))
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


def chunked_cross_entropy(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "n"],
    chunk_tokens: int = LOSS_CHUNK_TOKENS,
) -> Float[Tensor, ""]:
    """F.cross_entropy((hidden @ weight.T).float(), targets), with gradients to hidden and weight, chunk by chunk.

    Gradients of gradients raise a RuntimeError.

    Raises:
        ValueError: if there is not one target for each row of hidden, or no token in a chunk.
        RuntimeError: if a target is not a column of the vocabulary (F.cross_entropy would leave out one of −100:
            loss_of does so before).
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        shapes = f"hidden is {tuple(hidden.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: give (n, hidden) and (n,), as hidden.flatten(0, -2) and targets.flatten()")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: choose 1 or more, such as {LOSS_CHUNK_TOKENS}")
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_tokens, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, grad_enabled: bool
    ) -> Tensor:
        wide = _wide(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        wants_hidden, wants_weight = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            dlogits = linear(hidden[chunk], weight)  # the logits, as yet
            loss += cross_entropy_(dlogits, targets[chunk], to_gradient=wants_hidden or wants_weight)
            if dhidden is not None:
                dhidden[chunk] = product(dlogits, weight)
            if dweight is not None:
                dweight += product(dlogits.T, hidden[chunk])
            del dlogits  # or they would still be there while the next chunk's are made
        ctx.save_for_backward(dhidden, dweight)
        ctx.n, ctx.dtypes = len(targets), (hidden.dtype, weight.dtype)
        return loss / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        grads = [
            None if grad is None else (grad * (dloss / ctx.n)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None


def cross_entropy_(
    logits: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"], *, to_gradient: bool
) -> Float[Tensor, ""]:
    """Give the sum of the rows' cross-entropies; if wanted, turn `logits` into its gradient, p − one-hot(target).

    On a CPU ROWS_AT_ONCE rows at a time are made float32 or wider, so that these stay in a core's cache: over the whole
    chunk the same passes take twice as long, for memory that is new each time.
    """
    rows_at_once = ROWS_AT_ONCE if logits.device.type == "cpu" else max(1, len(logits))
    wide = _wide(logits.dtype)
    loss = torch.zeros((), dtype=wide, device=logits.device)
    for rows, target in zip(logits.split(rows_at_once), targets[:, None].split(rows_at_once), strict=True):
        log_p = F.log_softmax(rows, dim=1, dtype=wide)
        at_target = log_p.gather(1, target)
        loss -= at_target.sum()
        if to_gradient:
            rows.copy_(log_p.exp_().scatter_(1, target, at_target.expm1()))
    return loss


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
