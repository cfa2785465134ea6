"""A draft that transformers loads by itself: ``AutoModel.from_pretrained(DIR, trust_remote_code=True)``.

Beside the weights lies a modelling file that imports torch and transformers only.  SGLang serves the other form: this
one is for those who want to run or study a draft without this project.
"""

import shutil
from pathlib import Path
from typing import Any

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.checkpoint.adapters.network import SWITCHES
from nemo_speculative.checkpoint.contract import fields_of
from nemo_speculative.checkpoint.draft_checkpoint import Servable
from nemo_speculative.checkpoint.exports import modeling_eagle_draft
from nemo_speculative.checkpoint.exports.base import Export
from nemo_speculative.checkpoint.exports.files import write_model

MODELLING_FILE = Path(modeling_eagle_draft.__file__)
SAID_OTHERWISE = ("eagle_config", "num_aux_hidden_states", "rope_theta", "rope_scaling")
"""What servers read and this form says in other words, or once."""
CLASSES: dict[type[Draft], type] = {
    EagleDraft: modeling_eagle_draft.EagleDraftModel,
    Eagle3Draft: modeling_eagle_draft.Eagle3DraftModel,
}


class RemoteCodeExport(Export):
    """Weights, configuration and the code that runs them."""

    suffix = "transformers"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        write_model(directory, config_of(servable), servable.tensors)
        shutil.copyfile(MODELLING_FILE, directory / MODELLING_FILE.name)


def config_of(servable: Servable) -> dict[str, Any]:
    """The contents of ``config.json``."""
    fields = fields_of(servable.contract, servable.shape, servable.tensors["fc.weight"].dtype)
    network = CLASSES[servable.contract.draft].__name__
    named = {"AutoConfig": modeling_eagle_draft.EagleDraftConfig.__name__, "AutoModel": network}
    return {
        **{name: value for name, value in fields.items() if name not in SAID_OTHERWISE},
        **{name: getattr(servable.shape, name) for name in SWITCHES if hasattr(servable.shape, name)},
        "architectures": [network],
        "model_type": modeling_eagle_draft.EagleDraftConfig.model_type,
        "auto_map": {auto: f"{MODELLING_FILE.stem}.{name}" for auto, name in named.items()},
        "aux_layers": servable.aux_layers,
        "target": servable.provenance.target,
    }
