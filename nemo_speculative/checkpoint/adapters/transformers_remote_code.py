"""Writer of drafts that transformers alone can load: ``AutoModel.from_pretrained(DIR, trust_remote_code=True)``.

The directory contains a modeling file that imports torch and transformers only.  It is for running or studying a draft
without this project; SGLang serves the other form (:class:`~nemo_speculative.checkpoint.adapters.own.SGLangExport`).
"""

import shutil
from pathlib import Path
from typing import Any

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.adapters import modeling_eagle_draft
from nemo_speculative.checkpoint.adapters.base import Export, write_exported
from nemo_speculative.checkpoint.adapters.networks import SWITCHES
from nemo_speculative.checkpoint.contract import fields_of
from nemo_speculative.checkpoint.draft_checkpoint import Servable

MODELING_FILE = Path(modeling_eagle_draft.__file__)
REPLACED_FIELDS = ("eagle_config", "num_aux_hidden_states", "rope_theta", "rope_scaling")
"""Fields for servers that this form states under other names, or only once."""
CLASSES: dict[type[Draft], type] = {
    EagleDraft: modeling_eagle_draft.EagleDraftModel,
    Eagle3Draft: modeling_eagle_draft.Eagle3DraftModel,
}


class RemoteCodeExport(Export):
    """Weights, configuration and the code that runs them."""

    suffix = "transformers"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        write_exported(directory, config_of(servable), servable.tensors)
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)


def config_of(servable: Servable) -> dict[str, Any]:
    """The contents of ``config.json``."""
    fields = fields_of(servable.contract, servable.shape, servable.tensors["fc.weight"].dtype)
    network = CLASSES[servable.contract.draft].__name__
    named = {"AutoConfig": modeling_eagle_draft.EagleDraftConfig.__name__, "AutoModel": network}
    return {
        **{name: value for name, value in fields.items() if name not in REPLACED_FIELDS},
        **{name: getattr(servable.shape, name) for name in SWITCHES if hasattr(servable.shape, name)},
        "architectures": [network],
        "model_type": modeling_eagle_draft.EagleDraftConfig.model_type,
        "auto_map": {auto: f"{MODELING_FILE.stem}.{name}" for auto, name in named.items()},
        "aux_layers": servable.aux_layers,
        "target": servable.provenance.target,
    }
