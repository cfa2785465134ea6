"""``plan=true``: a remote or cached target takes memory only for embedding and head."""

import re

import pytest

from nemo_speculative.config.app import to_job
from nemo_speculative.training.plan import describe
from tests.config.test_groups import composed
from tests.integration.conftest import data_file, settings  # noqa: F401


def planned(settings, *overrides):  # noqa: F811
    return describe(to_job(composed("train_eagle3", *settings, *overrides)))


def target_bytes(message):
    result = re.search(r"memory .* target ([\d.]+) (MB|GB)", message)
    return float(result[1]) * {"MB": 1e6, "GB": 1e9}[result[2]]


@pytest.mark.parametrize(
    ("backend", "share"),
    [
        (["backend=features", "backend.directory=somewhere"], 0),
        (["backend=remote"], 0),
        (["backend=sglang"], 1),
        (["backend=features", "backend.directory=somewhere", "backend.fill=true"], 1),
    ],
    ids=["features", "remote", "sglang", "fill"],
)
def test_only_local_layers_are_counted(settings, tmp_path, wide_target, backend, share):  # noqa: F811
    here = [*settings, f"model.path={wide_target}"]
    plain, other = planned(here), planned(here, *backend)
    assert target_bytes(plain) > 5e6
    assert target_bytes(other) == target_bytes(plain) if share else target_bytes(other) < target_bytes(plain) / 5
    assert ("online" in other) == bool(share) and "cached" in other
