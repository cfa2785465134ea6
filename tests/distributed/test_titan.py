"""torchtitan's leaves are used on torch releases that it was not made for: what we import must be there."""

import torch

from nemo_speculative.distributed import titan


def test_every_name_that_we_take_is_there():
    assert all(getattr(titan, name) is not None for name in titan.__all__)


def test_the_device_is_bound_wherever_torchtitan_copied_it():
    import torchtitan.distributed.parallel_dims as parallel_dims
    import torchtitan.distributed.utils as utils

    before = utils.device_type, utils.device_module
    try:
        titan.bind_device("cpu")
        assert parallel_dims.device_type == utils.device_type == "cpu"
        assert utils.device_module.current_device is torch.cpu.current_device
    finally:
        titan.bind_device("cuda" if before[0] == "cuda" else "cpu")
