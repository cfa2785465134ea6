"""A self-contained EAGLE draft network for transformers: it needs only torch and transformers 5.

    draft = AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)
    feature = draft.read(aux_hidden_states)                         # once, for positions that the target has processed
    output = draft(embeddings_of_next_tokens, feature).last_hidden_state
    logits = draft.compute_logits(output[:, -1])                    # of draft.draft_ids
    feature = draft.feed_back(output)                               # the feature of the next step

The embedding, and for EAGLE-1 the head, are the target's: pass their outputs and weights.  EAGLE-1 and EAGLE-2:
2401.15077, 2406.16858; EAGLE-3: 2503.01840; EAGLE-3.1: 2605.09992.
"""

import torch
import transformers
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, rotate_half

if int(transformers.__version__.split(".")[0]) < 5:  # older versions ignore rope_parameters and use another theta
    raise ImportError(f"this draft needs transformers 5 or later, found {transformers.__version__}")


class EagleDraftConfig(PretrainedConfig):
    """Sizes of the Llama layers, and for EAGLE-3 the aux layers and switches: see ``config.json``."""

    model_type = "eagle_draft"


class Attention(nn.Module):
    """Grouped-query attention without a cache."""

    def __init__(self, config, width):
        super().__init__()
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, heads, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, attention_mask):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in projections)
        q, k = (y * cos + rotate_half(y) * sin for y in (q, k))
        mask = None if attention_mask is None else attention_mask[:, None]
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A Llama layer whose norms before the attention are named ``norms``."""

    def __init__(self, config, width, norms):
        super().__init__()
        for name in norms:
            self.add_module(name, _norm(config))
        self.self_attn = Attention(config, width)
        self.post_attention_layernorm = _norm(config)
        self.mlp = LlamaMLP(config)

    def forward(self, x, residual, *rotation_and_mask):
        residual = residual + self.self_attn(x, *rotation_and_mask)
        return residual + self.mlp(self.post_attention_layernorm(residual))


class DraftModel(PreTrainedModel):
    """The base of EAGLE-1 and EAGLE-3 drafts: layers over [token ; feature], run on their own output."""

    config_class = EagleDraftConfig
    base_model_prefix = ""
    deeper_norm: str
    layers: nn.ModuleList

    def __init__(self, config):
        super().__init__(config)
        # Not a submodule: its frequencies must stay float32, and loading would leave them uninitialized.
        self._rotary: dict = {}

    @property
    def stack(self):
        """The layers, lowest first."""
        return [self.midlayer] if hasattr(self, "midlayer") else list(self.layers)

    def forward(self, inputs_embeds, features, position_ids=None, attention_mask=None):
        """Layer outputs of a whole sequence; there is no cache.

        Args:
            inputs_embeds: [B, n, h], the target's embedding of the token AFTER each position.
            features: [B, n, h]: from :meth:`read` for positions that the target has processed, else :meth:`feed_back`.
            position_ids: int64 [B, n]; None: 0 … n - 1.
            attention_mask: bool [B, n, n], true where a position (second axis) attends to one (third); None: causal.

        Returns:
            BaseModelOutput with last_hidden_state [B, n, h], before the final norm.
        """
        if position_ids is None:
            position_ids = torch.arange(features.shape[1], device=features.device)[None]
        cos, sin = self.rotation(features, position_ids)
        x, residual = self._enter(inputs_embeds, features)
        for n, layer in enumerate(self.stack):
            if n:
                x = getattr(layer, self.deeper_norm)(residual)
            residual = layer(x, residual, cos, sin, attention_mask)
        return BaseModelOutput(last_hidden_state=residual)

    def _enter(self, embeddings, features):
        """The input of the first layer's attention, and its residual."""
        raise NotImplementedError

    def feed_back(self, output):
        """The feature of the next step: [..., h] → [..., h]."""
        return output

    def rotation(self, like, position_ids):
        """cos and sin [B, 1, n, d] for ``position_ids``, in the dtype of ``like``."""
        if like.device not in self._rotary:
            known = ("head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings")
            numbers = {name: getattr(self.config, name) for name in known}
            llama = LlamaConfig(**numbers, rope_parameters=dict(self.config.rope_parameters))
            self._rotary[like.device] = LlamaRotaryEmbedding(llama).to(like.device)
        cos, sin = self._rotary[like.device](like, position_ids)
        return cos[:, None], sin[:, None]


class EagleDraftModel(DraftModel):
    """EAGLE-1 and EAGLE-2: a prediction of the target's last hidden state, after its final norm."""

    deeper_norm = "input_layernorm"

    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.fc = nn.Linear(2 * h, h, bias=True)
        self.layers = nn.ModuleList(
            Layer(config, h, [self.deeper_norm] if n else []) for n in range(config.num_hidden_layers)
        )
        self.post_init()

    @property
    def draft_ids(self):
        """int64 [V]: the target id of each logit."""
        return torch.arange(self.config.vocab_size, device=self.device)

    def read(self, last_hidden_state):
        """Features of positions that the target has processed: its last hidden state after the final norm, [..., h]."""
        return last_hidden_state.to(self.dtype)

    def compute_logits(self, output, target_head):
        """[..., h] and the weight [V, h] of the target's head → [..., V]."""
        return linear(output, target_head)

    def _enter(self, embeddings, features):
        x = self.fc(torch.cat((embeddings.to(self.dtype), features), dim=-1))
        return x, x


class Eagle3DraftModel(DraftModel):
    """EAGLE-3, and EAGLE-3.1 by its switches."""

    deeper_norm = "hidden_norm"
    d2t: torch.Tensor

    def __init__(self, config):
        super().__init__(config)
        h, target, many = config.hidden_size, config.target_hidden_size, len(config.aux_layers)
        self.fc = nn.Linear(many * target, h, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(_norm(config, target) for _ in range(many))
        if config.norm_before_fc:
            self.input_norm = _norm(config, many * target)
        first = Layer(config, 2 * h, ["input_layernorm", "hidden_norm"])
        if config.num_hidden_layers == 1:
            self.midlayer = first
        else:
            deeper = (Layer(config, h, [self.deeper_norm]) for _ in range(config.num_hidden_layers - 1))
            self.layers = nn.ModuleList([first, *deeper])
        self.norm = _norm(config)
        if h != target:
            self.embed_tokens = nn.Embedding(config.vocab_size, h)
        if config.draft_vocab_size:
            self.lm_head = nn.Linear(h, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
        self.post_init()

    @property
    def draft_ids(self):
        """int64 [V_d]: the target id of each logit, ascending."""
        if not self.config.draft_vocab_size:
            return torch.arange(self.config.vocab_size, device=self.device)
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def read(self, aux):
        """Features of positions that the target has processed: outputs of the aux layers [..., A * h] → [..., h]."""
        aux = aux.to(self.dtype)
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        if self.config.fc_norm:
            parts = zip(self.fc_norm, aux.chunk(len(self.fc_norm), dim=-1), strict=True)
            aux = torch.cat([norm(part) for norm, part in parts], dim=-1)
        return self.fc(aux)

    def feed_back(self, output):
        return self.norm(output) if self.config.norm_output else output

    def compute_logits(self, output, target_head=None):
        """[..., h] → [..., V_d]; a draft without a head of its own takes the weight [V, h] of the target's."""
        return linear(self.norm(output), self.lm_head.weight if self.config.draft_vocab_size else target_head)

    def _enter(self, embeddings, features):
        first = self.stack[0]
        token = first.input_layernorm(embeddings.to(self.dtype))
        return torch.cat((token, first.hidden_norm(features)), dim=-1), features


def _norm(config, width=None):
    return nn.RMSNorm(width or config.hidden_size, eps=config.rms_norm_eps)
