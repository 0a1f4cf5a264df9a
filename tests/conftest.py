"""One setting for all tests: randomness that repeats, and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable_randomness() -> None:
    torch.manual_seed(0)
