"""Fixtures that more than one folder of tests needs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Several tests and ranks share the cores; small tensors gain nothing from more threads."""
    torch.set_num_threads(1)
