"""The forms in which a draft is written: for SGLang, for vLLM, and for transformers alone."""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from nemo_speculative.algorithms.eagle3.contract import Eagle3Contract, Eagle3Shape
from nemo_speculative.checkpoint.adapters.formats import SPECULATORS_TYPE, speculators_name
from nemo_speculative.checkpoint.contract import fields_of, llama_fields
from nemo_speculative.checkpoint.draft_checkpoint import Servable, write_model_files, write_servable
from nemo_speculative.utils.errors import UserError

MODELING_FILE = Path(__file__).with_name("modeling_eagle_draft.py")


class Export(ABC):
    """A form in which a draft is written."""

    suffix: ClassVar[str]
    """Suffix that forms the default directory name from the draft's."""

    @abstractmethod
    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        """Writes ``servable`` as it is into the empty ``directory``; raises UserError if this form cannot hold it.

        Args:
            target: the target's transformers configuration (the text part of it).
        """


class SGLangExport(Export):
    """A servable checkpoint, which SGLang and every program of this project read."""

    suffix = "servable"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        special_ids = {"bos_token_id": target.bos_token_id, "eos_token_id": target.eos_token_id}
        write_servable(
            directory, servable.contract.draft, servable.tensors, servable.shape, servable.provenance, servable.dtype,
            special_ids,
        )  # fmt: skip


class SpeculatorsExport(Export):
    """EAGLE-3 and EAGLE-3.1 for vLLM: ``vllm serve DIR`` reads the target from it."""

    suffix = "speculators"

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        shape = servable.shape
        if not isinstance(shape, Eagle3Shape) or shape.draft_vocab_size is None:
            kind = "EAGLE3 without a head of its own" if isinstance(shape, Eagle3Shape) else servable.algorithm
            raise UserError(f"{servable.directory}: is {kind}; speculators' format holds EAGLE-3 drafts with a head")
        # The format has no maps of the whole vocabulary.
        left_out = ("d2t", "t2d") if shape.draft_vocab_size == shape.vocab_size else ()
        tensors = {speculators_name(name): t for name, t in servable.tensors.items() if name not in left_out}
        write_model_files(directory, self.config(servable, shape, target), tensors)

    def config(self, servable: Servable, shape: Eagle3Shape, target: Any) -> dict[str, Any]:
        """The contents of ``config.json``."""
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": servable.provenance.speculative.num_steps,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        verifier = {"name_or_path": servable.provenance.target, "architectures": list(target.architectures or [])}
        layer = llama_fields(shape, servable.dtype)
        return {
            "architectures": ["Eagle3DraftModel"],  # speculators' class; vLLM chooses its own by the type
            SPECULATORS_TYPE: "eagle3",
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": verifier,
            },
            "transformer_layer_config": {key: value for key, value in layer.items() if value is not None},
            "draft_vocab_size": shape.draft_vocab_size,
            "target_hidden_size": shape.target_hidden_size,
            "eagle_aux_hidden_state_layer_ids": [number + 1 for number in shape.aux_layers],
            "norm_before_residual": False,  # vLLM's default is true
            **{name: getattr(shape, name) for name in Eagle3Contract.SWITCHES},
            "tie_word_embeddings": False,
            "torch_dtype": layer["torch_dtype"],
        }


class RemoteCodeExport(Export):
    """Weights, configuration and the code that runs them: ``AutoModel.from_pretrained(DIR, trust_remote_code=True)``.

    It is for running or studying a draft without this project; the code imports torch and transformers only.
    """

    suffix = "transformers"
    NETWORKS = {"LlamaForCausalLMEagle": "EagleDraftModel", "LlamaForCausalLMEagle3": "Eagle3DraftModel"}
    REPLACED_FIELDS = ("eagle_config", "num_aux_hidden_states", "rope_theta", "rope_scaling")
    """Fields for servers that this form states under other names, or only once."""

    def write(self, directory: Path, servable: Servable, target: Any) -> None:
        write_model_files(directory, self.config(servable), servable.tensors)
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)

    def config(self, servable: Servable) -> dict[str, Any]:
        """The contents of ``config.json``."""
        shape, architecture = servable.shape, servable.contract.architecture
        network = self.NETWORKS.get(architecture)
        if network is None:
            known = " and ".join(self.NETWORKS)
            raise UserError(f"{servable.directory}: is {architecture}; this form holds {known}")
        fields = fields_of(servable.contract, shape, servable.dtype)
        named = {"AutoConfig": "EagleDraftConfig", "AutoModel": network}
        return {
            **{name: value for name, value in fields.items() if name not in self.REPLACED_FIELDS},
            **{name: getattr(shape, name) for name in Eagle3Contract.SWITCHES if hasattr(shape, name)},
            "architectures": [network],
            "model_type": "eagle_draft",
            "auto_map": {auto: f"{MODELING_FILE.stem}.{name}" for auto, name in named.items()},
            "aux_layers": servable.aux_layers,
            "target": servable.provenance.target,
        }
