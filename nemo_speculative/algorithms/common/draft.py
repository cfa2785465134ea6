"""The base class of draft networks: Llama-like layers that read a token and a feature, run on their own output.

Training unrolls a draft (:func:`.ttt.unroll`), decoding extends a KV cache (:class:`.drafting.DraftSession`).  A
subclass defines what its first layer reads, where features come from, and what the head is.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import nn
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.layers import DraftLayer, Rotary
from nemo_speculative.algorithms.common.shape import DraftShape
from nemo_speculative.data.vocab_mapping import VocabMapping

if TYPE_CHECKING:  # a served command needs no Hydra
    from nemo_speculative.config.schema import DraftConfig


class FrozenEmbeddingAndHead(Protocol):
    """The two parts of the target that a draft uses and does not own."""

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor: ...

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor: ...


class Draft(nn.Module, ABC):
    """A draft network of the EAGLE family; its parameter names are those of the served checkpoint."""

    ARCHITECTURE: ClassVar[str]
    """The class that serves it, as ``config.json`` names it."""
    READS_LAST_HIDDEN: ClassVar[bool] = True
    """Whether :meth:`project_hidden_states` uses the last hidden state: then captured features need it everywhere."""

    target: FrozenEmbeddingAndHead
    """Set by :meth:`attach`; neither saved nor trained."""
    shape: Any

    def __init__(self, shape: DraftShape):
        super().__init__()
        self.rotary = Rotary(shape.rope_parameters, shape.head_dim, shape.max_positions)

    @classmethod
    @abstractmethod
    def shape_for(
        cls, config: "DraftConfig", target_config: Any, aux_layers: Sequence[int], vocabulary_size: int | None
    ) -> DraftShape:
        """The shape of ``config``'s draft for a target.

        Args:
            vocabulary_size: entries of the draft vocabulary; None: the target's head gives the logits.
        """

    def attach(self, target: FrozenEmbeddingAndHead) -> Self:
        """Gives the draft the target's frozen embedding and head."""
        self.target = target
        return self

    @property
    @abstractmethod
    def decoder_layers(self) -> Sequence[DraftLayer]:
        """The decoder layers, lowest first."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its computation."""
        # From one weight: a walk over all of them, at every token, would cost as much as the embedding.
        return self.decoder_layers[0].self_attn.q_proj.weight.dtype

    @abstractmethod
    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → embeddings [..., h]."""

    @abstractmethod
    def project_hidden_states(self, aux_hidden_states: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """The features of positions from the target's states there: [..., A * h], [..., h] → [..., h]."""

    @abstractmethod
    def project_tokens(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The part of the first layer that depends on the token alone, the same at every step: [n, h] → [n, w]."""

    @abstractmethod
    def pack_first_layer(self) -> tuple[torch.Tensor, ...]:
        """The weights of :meth:`project_first_layer`; made once per unroll, so that their gradients are summed once."""

    @abstractmethod
    def project_first_layer(
        self, packed: tuple[torch.Tensor, ...], token: torch.Tensor, feature: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the first layer, and its residual.

        Args:
            packed: from :meth:`pack_first_layer`.
            token: [n, w], from :meth:`project_tokens`.
            feature: [n, h].
            rows: the features of [q ; k ; v] that are needed.

        Returns:
            ``rows`` of [n, (H + 2 * H_kv) * d], and [n, h].
        """

    # The output.

    def next_feature(self, output: torch.Tensor) -> torch.Tensor:
        """The feature of the next step: the last layer's output [..., h] → [..., h]."""
        return output

    def head_input(self, output: torch.Tensor) -> torch.Tensor:
        """The input of the head: the last layer's output [..., h] → [..., h]."""
        return output

    @property
    def head_weight(self) -> torch.Tensor | None:
        """[V_d, h] of the draft's own head; None: the target's gives the logits."""
        return None

    def compute_logits(self, output: torch.Tensor) -> torch.Tensor:
        """The last layer's output [..., h] → [..., V_d]."""
        state, weight = self.head_input(output), self.head_weight
        return self.target.logits(state) if weight is None else linear(state, weight)

    @property
    @abstractmethod
    def draft_ids(self) -> torch.Tensor:
        """int64 [V_d]: the target ids of the draft vocabulary, ascending."""

    def set_vocab_mapping(self, vocabulary: VocabMapping) -> None:
        """Sets the ids of the draft vocabulary; a draft under the target's head proposes any id."""

    # The start from the target's weights.

    @abstractmethod
    def init_head(self, head: torch.Tensor, final_norm: torch.Tensor | None) -> None:
        """Copies the head from the target's, [V, h] and [h]."""

    @abstractmethod
    def init_fc(self) -> None:
        """Sets fc to the identity on the features that are nearest to the target's output."""
