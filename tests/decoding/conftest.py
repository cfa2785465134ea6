import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Lists by the ten thousand: collecting garbage among all that was imported would take most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
