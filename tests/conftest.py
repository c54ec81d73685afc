"""Fixtures of more than one module."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch: bits depend on the number, and on a busy machine two are many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
