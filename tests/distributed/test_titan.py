"""torchtitan's components are used with torch releases that it was not made for: all imports must exist."""

import torch

from nemo_speculative.distributed import titan


def test_every_imported_name_exists():
    assert all(getattr(titan, name) is not None for name in titan.__all__)


def test_the_device_is_bound_in_every_torchtitan_module():
    import torchtitan.distributed.parallel_dims as parallel_dims
    import torchtitan.distributed.utils as utils

    before = utils.device_type, utils.device_module
    try:
        titan.bind_device("cpu")
        assert parallel_dims.device_type == utils.device_type == "cpu"
        assert utils.device_module.current_device is torch.cpu.current_device
    finally:
        titan.bind_device("cuda" if before[0] == "cuda" else "cpu")
