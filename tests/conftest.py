"""Random numbers that do not depend on which tests ran before in the same process."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
