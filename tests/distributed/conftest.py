"""What all tests of several processes share."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started here, with which this one shares the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
