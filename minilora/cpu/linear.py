"""The linear layer of our decoder."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.cpu.products import linear


class Linear(nn.Linear):
    """torch's linear layer, with the same state and the same results, by `products.linear` where no gradients flow.

    y = x Wᵀ + bias
    """

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return super().forward(x)
        return linear(x, self.weight, self.bias)
