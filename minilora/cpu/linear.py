"""The linear layer of our decoder."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.cpu.products import linear


class Linear(nn.Linear):
    """torch's linear layer, with the same state; by `products.linear` where no gradients flow.

    y = x Wᵀ + bias
    """

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        tensors = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return super().forward(x)
        return linear(x, self.weight, self.bias)
