"""What every draft of the EAGLE family is: Llama-like layers that read a token and a feature, run on their own output.

Training unrolls it (:meth:`Draft.unroll`), decoding extends a cache (:meth:`Draft.extend`); a subclass says what its
first layer reads, where features come from, and what the head is.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import nn
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.attention import Pair, cached_attention
from nemo_speculative.algorithms.common.kv_cache import KVCache
from nemo_speculative.algorithms.common.layers import DraftLayer, Rotary, rotate
from nemo_speculative.algorithms.common.rope import plain_rope, positions_like, rope_like
from nemo_speculative.algorithms.common.slots import Layout, Slots
from nemo_speculative.algorithms.common.ttt import Entry, Prefix, first_pass, unroll
from nemo_speculative.data.vocab_mapping import VocabMapping

if TYPE_CHECKING:  # a served command needs no Hydra
    from nemo_speculative.config.schema import DraftConfig


@dataclass(frozen=True, kw_only=True)
class DraftShape:
    """Every number that shapes a draft network; subclasses add their own."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_parameters: dict[str, Any]
    vocab_size: int
    """Of the target."""
    num_layers: int = 1


def numbers_for(config: "DraftConfig | None", target_config: Any) -> dict[str, Any]:
    """The fields of :class:`DraftShape`: those of one of the target's layers, unless ``config`` says otherwise.

    Raises:
        UserError: the target's rotary embedding cannot be a draft's.
    """
    heads = target_config.num_attention_heads
    like_target = {
        "hidden_size": target_config.hidden_size,
        "intermediate_size": getattr(target_config, "intermediate_size", None) or 4 * target_config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(target_config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
        "num_layers": 1,
    }
    chosen = {name: getattr(config, name, None) for name in like_target}
    numbers = like_target | {name: value for name, value in chosen.items() if value is not None}
    theta = getattr(config, "rope_theta", None)
    rope = rope_like(target_config, numbers["head_dim"]) if theta is None else plain_rope(theta)
    return {
        **numbers,
        "rms_norm_eps": getattr(target_config, "rms_norm_eps", 1e-6),
        "max_positions": positions_like(target_config, rope),
        "rope_parameters": rope,
        "vocab_size": target_config.vocab_size,
    }


class FrozenEmbeddingAndHead(Protocol):
    """The two parts of the target that a draft uses and never owns."""

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor: ...

    def logits(self, last_hidden_state: torch.Tensor) -> torch.Tensor: ...


class Draft(nn.Module, ABC):
    """See the module's text.

    Parameter names are those of the served checkpoint, so exporting renames nothing.
    """

    ARCHITECTURE: ClassVar[str]
    """The class that serves it, as ``config.json`` names it."""
    ALGORITHM: ClassVar[str]
    """SGLang's --speculative-algorithm."""
    READS_LAST_HIDDEN: ClassVar[bool] = True
    """Whether :meth:`read` looks at the last hidden state, so that captured features must have it everywhere."""

    target: FrozenEmbeddingAndHead
    """Set by :meth:`attach`; neither saved nor trained."""

    def __init__(self, shape: DraftShape):
        super().__init__()
        self.rotary = Rotary(shape.rope_parameters, shape.head_dim, shape.max_positions)

    shape: Any

    @classmethod
    @abstractmethod
    def shape_for(
        cls, config: "DraftConfig", target_config: Any, aux_layers: Sequence[int], vocabulary_size: int | None
    ) -> DraftShape:
        """The shape that ``config`` gives for a target.

        Args:
            vocabulary_size: entries of the draft vocabulary; None: the target's head gives the logits.
        """

    def attach(self, target: FrozenEmbeddingAndHead) -> Self:
        """Gives the draft the target's frozen embedding and head."""
        self.target = target
        return self

    @property
    @abstractmethod
    def stack(self) -> Sequence[DraftLayer]:
        """The decoder layers, lowest first."""

    @property
    @abstractmethod
    def draft_ids(self) -> torch.Tensor:
        """int64 [V_d]: the target ids of the draft vocabulary, ascending."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        # Of one weight: a walk over all of them, at every token, would cost as much as the embedding.
        return self.stack[0].self_attn.q_proj.weight.dtype

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., h], of the target's frozen embedding."""
        return self.target.embed(input_ids).to(self.dtype)

    @abstractmethod
    def read(self, aux: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """The features of positions that the target has seen: [..., A * h], [..., h] → [..., h]."""

    @abstractmethod
    def token_input(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What depends on the token alone, computed once per token: [..., h] → [..., h]."""

    @abstractmethod
    def enter(self, token: torch.Tensor, feature: torch.Tensor) -> Pair:
        """What the first layer's attention reads, and its residual [..., h]."""

    def head_input(self, output: torch.Tensor) -> torch.Tensor:
        """What the head reads: [..., h], as ``unroll`` and ``extend`` return it → [..., h]."""
        return output

    @property
    def head_weight(self) -> torch.Tensor | None:
        """[V_d, h] of the draft's own head; None: the target's gives the logits."""
        return None

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """[..., h], as ``unroll`` and ``extend`` return it → [..., V_d]."""
        state, weight = self.head_input(output), self.head_weight
        return self.target.logits(state) if weight is None else linear(state, weight)

    def feed_back(self, output: torch.Tensor) -> torch.Tensor:
        """The feature of the next step: [..., h] → [..., h]."""
        return output

    def set_vocab_mapping(self, vocabulary: VocabMapping) -> None:
        """Sets the ids of the draft vocabulary; a draft under the target's head proposes any id."""

    @abstractmethod
    def start_head(self, head: torch.Tensor, final_norm: torch.Tensor | None) -> None:
        """Starts the head from the target's, [V, h] and [h]."""

    @abstractmethod
    def start_fc(self) -> None:
        """Starts fc as an identity on the features that are nearest to the target's output."""

    @abstractmethod
    def entry(self) -> Entry:
        """:meth:`token_input`, :meth:`enter` and the first layer's projections, with the token's share apart.

        Made for each batch: it holds the weights as they are now.
        """

    def first_pass(self, embeddings: torch.Tensor, features: torch.Tensor, layout: Layout) -> Prefix:
        """What :meth:`unroll` reads of a batch.

        Args:
            embeddings: [B, L, h] of the tokens x_t, from :meth:`embed`; where the batch is shared [1, m, h].
            features: the same, from :meth:`read`.
            layout: of this batch.
        """
        return first_pass(self, embeddings.flatten(0, 1), features.flatten(0, 1), layout)

    def unroll(self, prefix: Prefix, slots: Slots) -> list[torch.Tensor]:
        """The training-time test: the teacher-forced steps of slots.

        Step i of slot t reads the embedding of x_{t+1+i}, at position t + i.  After the step-0 keys and values a slot
        touches no other, so everything else is computed for the given slots only.

        Args:
            prefix: from :meth:`first_pass`, as it is ``seen_by`` the slots.
            slots: of this batch.

        Returns:
            Layer outputs [n_i, h] for each step i: of the first n_i = ``slots.alive[i]`` slots.
        """
        return unroll(self, prefix, slots)

    def extend(
        self, embeddings: torch.Tensor, feature: torch.Tensor, rotation: Pair, cache: KVCache,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Decoding: the layers on n new positions of each sequence behind ``cache``, to which their keys are added.

        Args:
            embeddings: [B, n, h] of the tokens after those positions, from :meth:`embed`.
            feature: [B, n, h]: from :meth:`read`, or from :meth:`feed_back` of the step before.
            rotation: cos and sin [B or 1, 1, n, d] of those positions, from ``rotary``.
            visible: bool [B, n, m] over the m cached positions, the new ones last; None: causal.

        Returns:
            Layer outputs [B, n, h].
        """
        cos, sin = rotation
        x, residual = self.enter(self.token_input(embeddings), feature)
        for n, layer in enumerate(self.stack):
            if n:
                x = layer.normed(residual)
            keys, values = cache.append(n, *layer.keys_values(x, cos, sin))
            q = rotate(layer.queries(x), cos, sin)
            attended = cached_attention(q, keys, values, visible)
            residual = layer.finish(residual, attended.transpose(1, 2).flatten(2))
        return residual
