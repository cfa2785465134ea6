"""The checkpoint for serving, and the formats that a draft is converted into."""

from dataclasses import dataclass
from typing import Any, Optional

from nemo_speculative.config.schema.common import Dtype, require, require_positive
from nemo_speculative.config.speculative import SpeculativeSettings, default_draft_tokens, largest_tree, smallest_tree


@dataclass
class ExporterConfig:
    """The checkpoint for serving, and the speculative settings recorded in it."""

    dtype: Optional[Dtype] = None
    """dtype of the draft's weights on disk; null: the target's."""
    num_steps: int = 5
    """Draft tokens in a chain (SGLang's --speculative-num-steps)."""
    topk: int = 1
    """Branches a draft step keeps (--speculative-eagle-topk); 1 is a chain."""
    num_draft_tokens: Any = None
    """Tokens verified at once, the last sampled one included; null: steps * topk + 1; auto (with topk above 1):
    several are measured after training, and the cheapest per token is recorded."""
    sglang_version: str = "0.5.23"
    """SGLang version for serving; a draft that it cannot serve is refused."""

    def __post_init__(self) -> None:
        require_positive(self, "exporter", "num_steps", "topk")
        if self.num_draft_tokens is None:
            self.num_draft_tokens = default_draft_tokens(self.num_steps, self.topk)
        if self.measure_width:
            return require(
                self.topk > 1,
                "exporter.num_draft_tokens is auto: a chain (exporter.topk=1) always has exporter.num_steps + 1; set "
                "exporter.topk above 1, or leave it out",
            )
        tokens, least, most = self.num_draft_tokens, smallest_tree(self.topk), largest_tree(self.num_steps, self.topk)
        whole = isinstance(tokens, int) and not isinstance(tokens, bool)
        require(whole and tokens > 0, f"exporter.num_draft_tokens is {tokens!r}: expected a number above 0, or auto")
        require(
            self.topk == 1 or least <= tokens <= most,
            f"exporter.num_draft_tokens is {tokens}: a tree of {self.num_steps} steps and top-k {self.topk} has "
            f"{least} to {most} nodes",
        )
        require(
            self.topk > 1 or tokens == self.num_steps + 1,
            f"exporter.num_draft_tokens is {tokens}: with exporter.topk=1 it must be exporter.num_steps + 1 = "
            f"{self.num_steps + 1}",
        )
        return None

    @property
    def measure_width(self) -> bool:
        """Whether num_draft_tokens is found by measuring."""
        return self.num_draft_tokens == "auto"

    @property
    def speculative(self) -> SpeculativeSettings:
        """The speculative settings; those of a full beam if they are still to be measured."""
        tokens = default_draft_tokens(self.num_steps, self.topk) if self.measure_width else self.num_draft_tokens
        return SpeculativeSettings(self.num_steps, self.topk, tokens)


@dataclass
class FormConfig:
    """The format that SGLang serves and every program of this project reads."""

    _target_: str = "nemo_speculative.checkpoint.adapters.exports.SGLangExport"


@dataclass
class SpeculatorsFormConfig(FormConfig):
    """The format of speculators, which vLLM serves (EAGLE-3)."""

    _target_: str = "nemo_speculative.checkpoint.adapters.exports.SpeculatorsExport"


@dataclass
class TransformersFormConfig(FormConfig):
    """The format that transformers loads with the code next to the weights (trust_remote_code)."""

    _target_: str = "nemo_speculative.checkpoint.adapters.exports.RemoteCodeExport"
