"""Fixtures of more than one module."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several workers has one core: with two threads each, both are many times slower. For children too.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch: bits depend on the number, and on a busy machine two are many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
