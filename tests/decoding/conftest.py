import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Keeps imported objects out of garbage collection, which would take most of the time of tests with large lists."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
