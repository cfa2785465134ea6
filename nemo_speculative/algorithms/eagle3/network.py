"""The EAGLE-3 draft network (2503.01840), and EAGLE-3.1 (2605.09992) by three switches.

Notable choices:
- layers and fc have no bias; the first layer's q, k and v read [embedding ; feature], the embedding first, and only
  that layer sees the token;
- the residual is the feature before its norm; the next step reads the layer's output before the final norm, or with
  ``norm_output`` after it (the head reads the normed state either way);
- the embedding is the target's, frozen and held outside: a server overwrites it with the target's anyway, unless the
  hidden sizes differ; then the draft trains its own;
- d2t holds offsets (target id = j + d2t[j]), t2d is a mask over the target's vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.common.layers import DraftLayer, RMSNorm
from nemo_speculative.algorithms.eagle3.contract import Eagle3Shape
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.utils.errors import UserError

if TYPE_CHECKING:  # a served command needs no Hydra
    from nemo_speculative.config.schema import DraftConfig

LOW_AUX_SCALE = 0.2
"""Factor of fc's random weights where fc starts as the identity on the highest aux state."""


class Eagle3Draft(Draft):
    """An EAGLE-3 or EAGLE-3.1 draft."""

    ARCHITECTURE = "LlamaForCausalLMEagle3"
    READS_LAST_HIDDEN = False

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, shape: Eagle3Shape):
        super().__init__(shape)
        self.fc = nn.Linear(shape.fc_width, shape.hidden_size, bias=False)
        if shape.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(shape, shape.target_hidden_size) for _ in shape.aux_layers)
        if shape.norm_before_fc:
            self.input_norm = RMSNorm(shape, shape.fc_width)
        # It reads [input_layernorm(embedding) ; hidden_norm(feature)].
        first = DraftLayer(shape, 2 * shape.hidden_size, "hidden_norm")
        first.input_layernorm = RMSNorm(shape)
        # One layer is ``midlayer``, which every version of SGLang loads; several are ``layers.N``.
        if shape.num_layers == 1:
            self.midlayer = first
        else:
            deeper = (DraftLayer(shape, shape.hidden_size, "hidden_norm") for _ in range(shape.num_layers - 1))
            self.layers = nn.ModuleList([first, *deeper])
        self.norm = RMSNorm(shape)
        if shape.own_embedding:
            self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        own_head = shape.draft_vocab_size is not None
        entries = shape.draft_vocab_size or shape.vocab_size
        if own_head:
            self.lm_head = nn.Linear(shape.hidden_size, entries, bias=False)
        self.register_buffer("d2t", torch.zeros(entries, dtype=torch.long), persistent=own_head)
        self.register_buffer("t2d", torch.ones(shape.vocab_size, dtype=torch.bool), persistent=own_head)

    @classmethod
    def shape_for(
        cls, config: "DraftConfig", target_config: Any, aux_layers: Sequence[int], vocabulary_size: int | None
    ) -> Eagle3Shape:
        return Eagle3Shape.like_target(target_config, aux_layers, vocabulary_size, config)

    @property
    def decoder_layers(self) -> Sequence[Any]:
        return [self.midlayer] if self.shape.num_layers == 1 else list(self.layers)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.shape.hidden_size != self.shape.target_hidden_size:
            return self.embed_tokens(input_ids)  # type: ignore[no-any-return]
        return self.target.embed(input_ids).to(self.fc.weight.dtype)

    def project_hidden_states(self, aux_hidden_states: torch.Tensor, last_hidden_state: torch.Tensor) -> torch.Tensor:
        aux = aux_hidden_states.to(self.fc.weight.dtype)
        if self.shape.norm_before_fc:
            aux = self.input_norm(aux)
        if self.shape.fc_norm:
            parts = zip(self.fc_norm, aux.chunk(len(self.fc_norm), dim=-1), strict=True)
            aux = torch.cat([norm(part) for norm, part in parts], dim=-1)
        return self.fc(aux)  # type: ignore[no-any-return]

    def project_tokens(self, embeddings: torch.Tensor) -> torch.Tensor:
        first = self.decoder_layers[0]
        return linear(first.input_layernorm(embeddings), first.qkv_weight(slice(0, self.shape.hidden_size)))

    def pack_first_layer(self) -> tuple[torch.Tensor, ...]:
        return (self.decoder_layers[0].qkv_weight(slice(self.shape.hidden_size, None)),)

    def project_first_layer(
        self, packed: tuple[torch.Tensor, ...], token: torch.Tensor, feature: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # W [embedding ; feature] is the sum of the token's part and the feature's.
        normed = self.decoder_layers[0].hidden_norm(feature)
        return torch.addmm(token[:, rows], normed, packed[0][rows].T), feature

    def next_feature(self, output: torch.Tensor) -> torch.Tensor:
        return self.norm(output) if self.shape.norm_output else output

    def head_input(self, output: torch.Tensor) -> torch.Tensor:
        return self.norm(output)

    @property
    def head_weight(self) -> torch.Tensor | None:
        return self.lm_head.weight if self.shape.draft_vocab_size else None

    @property
    def draft_ids(self) -> torch.Tensor:
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def set_vocab_mapping(self, vocabulary: VocabMapping) -> None:
        self.d2t.copy_(vocabulary.d2t)
        self.t2d.copy_(vocabulary.t2d)

    def init_head(self, head: torch.Tensor, final_norm: torch.Tensor | None) -> None:
        """Copies the final norm, and the head's rows of the draft vocabulary."""
        if self.shape.own_embedding:
            raise UserError(
                f"draft.init_from_target.head: the target's head reads {head.shape[1]} features, the draft's "
                f"{self.shape.hidden_size}; set draft.init_from_target.head=false"
            )
        if self.shape.draft_vocab_size:
            self.lm_head.weight.copy_(head[self.draft_ids.to(head.device)])
        if final_norm is not None:
            self.norm.weight.copy_(final_norm)

    def init_fc(self) -> None:
        """Sets fc to the identity on the highest aux state."""
        h = self.shape.hidden_size
        if self.shape.own_embedding:
            raise UserError(
                f"draft.init_from_target.fc: fc is no identity from {self.shape.target_hidden_size} to {h} features; "
                "set draft.init_from_target.fc=false"
            )
        self.fc.weight.mul_(LOW_AUX_SCALE)
        self.fc.weight[:, -h:] += torch.eye(h, device=self.fc.weight.device)
