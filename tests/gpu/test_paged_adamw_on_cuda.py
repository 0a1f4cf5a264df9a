"""PagedAdamW on a card: pages in pinned memory. We have not run this file: we have no card."""

import pytest
import torch
from torch import nn

from minilora.qlora import PagedAdamW


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("n_frames", [1, 2, 7])
def test_a_budget_on_a_card_gives_the_bits_of_no_budget(n_frames, state_bits):
    start = [torch.randn(size, device="cuda") for size in (300_000, 4096, 100)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    page_bytes = 2**16
    paged = PagedAdamW(ours, state_bits=state_bits, page_bytes=page_bytes, budget_bytes=n_frames * page_bytes)
    whole = PagedAdamW(theirs, state_bits=state_bits)
    for _ in range(50):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        paged.step()
        whole.step()

    assert paged.traffic.evictions > 0
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
