"""One tiny decoder for all tests of the model, and the real one, loaded once."""

import pytest
import torch
from tiny_decoder import tiny_config

from minilora.llm import Decoder, Tokenizer, load_model


@pytest.fixture
def tiny() -> Decoder:
    """Random weights in float64, where two ways to the same number differ by rounding alone (about 1e-15).

    The weights are large enough that it does not say the same token for ever.
    """
    torch.manual_seed(0)
    model = Decoder(tiny_config()).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="session")
def smollm2_135m() -> tuple[Decoder, Tokenizer]:
    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def tokenizer(smollm2_135m) -> Tokenizer:
    return smollm2_135m[1]
