"""Fingerprint of a target model's files, computed without importing torch."""

import hashlib
import json
from pathlib import Path

NUM_SAMPLES, SAMPLE_BYTES = 512, 1 << 13


def target_fingerprint(path: Path) -> str:
    """A hash over the configuration and the names, sizes and evenly spaced samples of the weight files in ``path``."""
    digest = hashlib.sha256()
    config = json.loads((path / "config.json").read_text())
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as weights:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            for start in range(0, size, max(size // NUM_SAMPLES, SAMPLE_BYTES)):
                weights.seek(start)
                digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
