"""Attention of one new token a row to all tokens before it and itself, as generating text asks for it.

    batch     rows                       past       tokens read before       total    past + 1
    q         (batch, heads · head_dim)        k, v     (batch, kv_heads · head_dim)        all bfloat16

    y = softmax(q kᵀ / √head_dim) v,  q and k turned to their position              [Attention] eq. 1, [RoPE] eq. 34

Written with torch it is fifteen small operations a layer, most of which take longer to call than to compute. Here it
is one call. A thread takes one row's key head: it writes the new key, turned, and the new value into the cache, and
reads every key and value there once, for all query heads that share them. Everything between is float32; y is rounded
once. A row gives the same bits alone as among others.

Read before this file: cpu/jobs.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minilora import cpu
from minilora.cpu.jobs import address, digest_of, part, run, take, worker
from minilora.cpu.pointwise import exp, summing
from minilora.cpu.products import are_bfloat16
from minilora.cpu.vectors import from_bfloat16, to_bfloat16

TOKENS_AT_ONCE = 16
TENSORS = "q", "k", "v", "cos", "sin", "keys", "values", "mask", "y"
SIZES = "batch", "heads", "kv_heads", "head_dim", "past", "max_tokens", "n_rotations"
JOB = np.dtype([(name, np.int64) for name in ("taken", *TENSORS, *SIZES)])


def attention(
    q: Float[Tensor, "batch 1 q_features"],
    k: Float[Tensor, "batch 1 kv_features"],
    v: Float[Tensor, "batch 1 kv_features"],
    rotation: tuple[Float[Tensor, "rows 1 head_dim"], Float[Tensor, "rows 1 head_dim"]],
    keys: Float[Tensor, "batch kv_heads max_tokens head_dim"],
    values: Float[Tensor, "batch kv_heads max_tokens head_dim"],
    past: int,
    mask: Bool[Tensor, "batch 1 1 total"] | None = None,
) -> Float[Tensor, "batch 1 q_features"]:
    """Write k and v into `keys` and `values` at `past`, and give what q mixes of the values. No gradients flow.

    `rotation` is model.rotation_of's; `mask` is True where a row may look.

    Raises:
        ValueError: if shapes do not fit together, or a tensor is not bfloat16, plain and in one piece.
    """
    batch, kv_heads, max_tokens, head_dim = keys.shape
    heads, (cos, sin) = q.shape[-1] // head_dim, rotation
    fit = (
        q.shape == (batch, 1, heads * head_dim)
        and k.shape == v.shape == (batch, 1, kv_heads * head_dim)
        and heads % kv_heads == 0
        and head_dim % 2 == 0
        and values.shape == keys.shape
        and 0 <= past < max_tokens
        and cos.shape == sin.shape == (len(cos), 1, head_dim)
        and len(cos) in (1, batch)
        and (mask is None or (mask.shape == (batch, 1, 1, past + 1) and mask.dtype == torch.bool))
    )
    named = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "keys": keys, "values": values}
    if not fit or not are_bfloat16(*named.values()):
        found = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in named.items())
        raise ValueError(f"at {past}, these do not fit together, are not bfloat16, or lie in pieces: {found}")
    y, mask = q.new_empty(q.shape), None if mask is None else mask.contiguous()
    pointers = [t.data_ptr() for t in (q, k, v, cos, sin, keys, values)]
    at_mask = 0 if mask is None else mask.data_ptr()
    sizes = batch, heads, kv_heads, head_dim, past, max_tokens, len(cos)
    run(_attention(head_dim), batch * kv_heads, *pointers, at_mask, y.data_ptr(), *sizes)
    return y


@cache
def _attention(head_dim: int) -> Any:
    sources = digest_of(cpu)

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        group, total = job.heads // job.kv_heads, job.past + 1
        q = numba.carray(address(job.q), (job.batch * job.kv_heads, group, job.head_dim), np.uint16)
        k = numba.carray(address(job.k), (job.batch * job.kv_heads, job.head_dim), np.uint16)
        v = numba.carray(address(job.v), (job.batch * job.kv_heads, job.head_dim), np.uint16)
        y = numba.carray(address(job.y), (job.batch * job.kv_heads, group, job.head_dim), np.uint16)
        cos = numba.carray(address(job.cos), (job.n_rotations, job.head_dim), np.uint16)
        sin = numba.carray(address(job.sin), (job.n_rotations, job.head_dim), np.uint16)
        cache_shape = job.batch * job.kv_heads, job.max_tokens, job.head_dim
        keys = numba.carray(address(job.keys), cache_shape, np.uint16)
        values = numba.carray(address(job.values), cache_shape, np.uint16)
        mask = numba.carray(address(job.mask), (job.batch if job.mask else 0, total), np.uint8)
        queries, sums = np.empty((group, job.head_dim), np.float32), np.empty((group, job.head_dim), np.float32)
        scores, inverses = np.empty((group, total), np.float32), np.empty(group, np.float32)
        widened = np.empty((TOKENS_AT_ONCE, job.head_dim), np.float32)
        scale = np.float32(1) / np.sqrt(np.float32(job.head_dim))
        while True:
            piece = take(all_jobs, 1)
            if piece >= job.batch * job.kv_heads:
                return
            row = piece // job.kv_heads
            turn = row if job.n_rotations > 1 else 0
            rotate(k[piece], cos[turn], sin[turn], np.float32(1), queries[0])
            for i in range(job.head_dim):
                keys[piece, job.past, i] = to_bfloat16(queries[0, i])
                values[piece, job.past, i] = v[piece, i]
            for head in range(group):
                rotate(q[piece, head], cos[turn], sin[turn], scale, queries[head])
            score(head_dim, queries, keys[piece], widened, scores)
            if job.mask:
                hide(scores, mask[row])
            for head in range(group):
                inverses[head] = weigh(scores[head])
            mix(head_dim, scores, values[piece], widened, sums)
            for head in range(group):
                for i in range(job.head_dim):
                    y[piece, head, i] = to_bfloat16(sums[head, i] * inverses[head])

    return worker(work, JOB)


@part
def rotate(x, cos, sin, scale, y):
    """y = x turned, as model.rotate turns it, times `scale`."""
    half = len(x) // 2
    for i in range(half):
        first, second = from_bfloat16(x[i]), from_bfloat16(x[half + i])
        y[i] = (first * from_bfloat16(cos[i]) + second * from_bfloat16(sin[i])) * scale
        y[half + i] = (second * from_bfloat16(cos[half + i]) + first * from_bfloat16(sin[half + i])) * scale


@summing
def score(head_dim, queries, keys, widened, scores):
    """scores[head, token] = queries[head] · keys[token]."""
    for start in range(0, scores.shape[1], TOKENS_AT_ONCE):
        count = min(TOKENS_AT_ONCE, scores.shape[1] - start)
        widen(head_dim, keys, start, count, widened)
        for head in range(scores.shape[0]):
            for token in range(count):
                total = np.float32(0)
                for i in range(head_dim):
                    total += queries[head, i] * widened[token, i]
                scores[head, start + token] = total


@part
def widen(head_dim, words, start, count, floats):
    """Make so many tokens' numbers float32, once for all heads."""
    for token in range(count):
        for i in range(head_dim):
            floats[token, i] = from_bfloat16(words[start + token, i])


@part
def hide(scores, mask):
    for head in range(scores.shape[0]):
        for token in range(scores.shape[1]):
            if not mask[token]:
                scores[head, token] = -np.inf


@summing
def weigh(scores):
    """Make probabilities of scores, but for their sum; give 1 / sum. What is hidden has none."""
    most, total = scores[0], np.float32(0)
    for token in range(len(scores)):
        most = max(most, scores[token])
    for token in range(len(scores)):
        weight = exp(scores[token] - most)
        scores[token] = weight if scores[token] > -np.inf else np.float32(0)
        total += scores[token]
    return np.float32(1) / total


@part
def mix(head_dim, weights, values, widened, sums):
    """sums[head] = the values, each times its weight."""
    sums[:] = 0
    for start in range(0, weights.shape[1], TOKENS_AT_ONCE):
        count = min(TOKENS_AT_ONCE, weights.shape[1] - start)
        widen(head_dim, values, start, count, widened)
        for head in range(weights.shape[0]):
            if count == TOKENS_AT_ONCE:
                for i in range(head_dim):
                    total = sums[head, i]
                    for token in range(TOKENS_AT_ONCE):
                        total += weights[head, start + token] * widened[token, i]
                    sums[head, i] = total
            else:
                for token in range(count):
                    for i in range(head_dim):
                        sums[head, i] += weights[head, start + token] * widened[token, i]
