"""A tiny Wan for all tests of this folder: read it, copy it, never write into it."""

import pytest
import torch

from minianyflow.wan.folders import make_tiny_wan


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A pipeline folder in Wan2.1's layout with 16 clips in latents/; its null prompt is "ugly"."""
    folder = tmp_path_factory.mktemp("wan") / "tiny"
    torch.manual_seed(4)
    before = torch.get_rng_state()
    make_tiny_wan(folder, null="ugly")
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers move
    return folder
