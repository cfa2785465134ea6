import os

import pytest
import torch

from nemo_speculative.config.schema import ParallelismConfig
from nemo_speculative.distributed.parallelism import process_group
from nemo_speculative.targets.hf import HFTarget
from tests.conftest import make_target
from tests.targets.cached.cases import capture_into, eagle1, eagle3, make_documents


@pytest.fixture(scope="package", autouse=True)
def one_rank():
    """A process group of one rank, which capture needs."""
    before = dict(os.environ)
    with process_group(torch.device("cpu"), ParallelismConfig()):
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def documents():
    return make_documents()


@pytest.fixture(params=[eagle3, eagle1], ids=["eagle3", "eagle1"])
def algorithm(request):
    return request.param()


@pytest.fixture
def online(algorithm, online_of):
    """The target in this process."""
    return online_of(algorithm)


@pytest.fixture(scope="session")
def online_of(target, target_dir):
    """Function that returns the target with an algorithm's aux layers."""
    plain = HFTarget(target_dir, aux_layers=[])
    return lambda algorithm: target if algorithm.aux_layers is None else plain


@pytest.fixture
def captured(algorithm, online, documents, tmp_path):
    """A directory with the features of the documents."""
    return capture_into(tmp_path / "features", online, documents, algorithm)


@pytest.fixture(scope="session")
def wide_target(tmp_path_factory):
    """A target whose layers are megabytes."""
    wide = {"hidden_size": 128, "intermediate_size": 512}
    return make_target(tmp_path_factory.mktemp("wide"), **wide)
