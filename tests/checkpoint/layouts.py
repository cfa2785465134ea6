"""Tiny random drafts in the formats of other projects, and reference outputs of their networks, one position at a time.

Names, files and fields are written out by hand from each project's published layout; nothing of the code under test
is used.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, EPS = 32, 24, 4, 2, 8, 300, 1e-5
"""Hidden size and vocabulary of the tests' target, which has 8 layers."""
DRAFT_IDS = [0, 2, 3, 7, 11, 19, 40, 41, 99, 150, 298, 299]
NUMBERS = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": EPS,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "model_type": "llama",
    "max_position_embeddings": 2048,
}
Tensors = dict[str, torch.Tensor]


def randoms(shapes: dict[str, list[int]], seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def layer_shapes(prefix: str, width: int, norms: list[str]) -> dict[str, list[int]]:
    """A Llama layer with ``prefix`` before its names, whose attention reads ``width`` features."""
    return {
        **{f"{prefix}{norm}.weight": [HIDDEN] for norm in (*norms, "post_attention_layernorm")},
        f"{prefix}self_attn.q_proj.weight": [HEADS * HEAD_DIM, width],
        f"{prefix}self_attn.k_proj.weight": [KV_HEADS * HEAD_DIM, width],
        f"{prefix}self_attn.v_proj.weight": [KV_HEADS * HEAD_DIM, width],
        f"{prefix}self_attn.o_proj.weight": [HIDDEN, HEADS * HEAD_DIM],
        f"{prefix}mlp.gate_proj.weight": [INNER, HIDDEN],
        f"{prefix}mlp.up_proj.weight": [INNER, HIDDEN],
        f"{prefix}mlp.down_proj.weight": [HIDDEN, INNER],
    }


def vocabulary_maps() -> Tensors:
    return {
        "d2t": torch.tensor([target - j for j, target in enumerate(DRAFT_IDS)]),
        "t2d": torch.tensor([target in DRAFT_IDS for target in range(VOCAB)]),
    }


def eagle3_tensors(layer: str = "midlayer.", outer: str = "", extra: dict[str, list[int]] | None = None) -> Tensors:
    """The tensors of EAGLE-3: ``outer`` precedes all names but the head's and the maps', ``layer`` names the layer."""
    norms = ["input_layernorm", "hidden_norm"]
    shapes = {
        f"{outer}fc.weight": [HIDDEN, 3 * HIDDEN],
        **layer_shapes(f"{outer}{layer}", 2 * HIDDEN, norms),
        f"{outer}norm.weight": [HIDDEN],
        "lm_head.weight": [len(DRAFT_IDS), HIDDEN],
        f"{outer}embed_tokens.weight": [VOCAB, HIDDEN],
        **(extra or {}),
    }
    return randoms(shapes) | vocabulary_maps()


def write(directory: Path, config: dict, tensors: Tensors, file: str = "model.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(tensors, directory / file)
    else:
        torch.save(tensors, directory / file)
    return directory


def safeailab_eagle(directory: Path, **config) -> Path:
    """yuhuili/EAGLE-*: one layer without an input norm, fc with a bias, the target's embedding stored again."""
    shapes = {
        "embed_tokens.weight": [VOCAB, HIDDEN],
        "fc.weight": [HIDDEN, 2 * HIDDEN],
        "fc.bias": [HIDDEN],
        **layer_shapes("layers.0.", HIDDEN, []),
    }
    stated = NUMBERS | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "rope_theta": 500000.0}
    return write(directory, stated | config, randoms(shapes), "pytorch_model.bin")


def safeailab_eagle3(directory: Path, **config) -> Path:
    """yuhuili/EAGLE3-*: no rope_theta in its configuration, and nothing on aux layers."""
    stated = NUMBERS | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(DRAFT_IDS)}
    return write(directory, stated | config, eagle3_tensors(), "pytorch_model.bin")


def specforge(directory: Path, **config) -> Path:
    """An EAGLE-3.1 export of SpecForge, with its aux layers."""
    stated = NUMBERS | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": len(DRAFT_IDS),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 5], "use_aux_hidden_state": True},
        "fc_norm": True,
        "norm_output": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "dtype": "float32",
    }
    tensors = eagle3_tensors(extra={f"fc_norm.{i}.weight": [HIDDEN] for i in range(3)})
    del tensors["embed_tokens.weight"]
    return write(directory, stated | config, tensors)


AUTOMODEL = NUMBERS | {
    "architectures": ["LlamaEagle3DraftModel"],
    "num_hidden_layers": 8,
    "draft_vocab_size": len(DRAFT_IDS),
    "target_hidden_size": HIDDEN,
    "fc_norm": False,
    "norm_output": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
"""NeMo AutoModel's configuration is the target's, including num_hidden_layers."""


def automodel(outer: Path, **config) -> Path:
    """``epoch_1_step_70/`` of current versions: consolidated shards with an index, and the recipe's configuration."""
    inner = outer / "model/consolidated"
    tensors = eagle3_tensors("layers.0.", "model.")
    names = sorted(tensors)
    write(inner, AUTOMODEL | config, {name: tensors[name] for name in names[:5]}, "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, inner / "model-00002-of-00002.safetensors")
    files = {name: f"model-0000{1 if i < 5 else 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (inner / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    meta = {"global_step": 70, "epoch": 1, "selected_token_ids": torch.tensor(DRAFT_IDS)}
    torch.save(meta, outer / "eagle_meta.pt")
    (outer / "config.yaml").write_text(
        "recipe_args:\n  target_model_name_or_path: org/target\n  aux_layer_ids: [0, 2, 4]\n  lr: ${optimizer.lr}\n"
    )
    return outer


def automodel_bare(outer: Path, **config) -> Path:
    """NeMo AutoModel's first layout: a bare state dict, and the vocabulary only in the metadata."""
    tensors = {name: t for name, t in eagle3_tensors("layers.0.", "model.").items() if name not in ("d2t", "t2d")}
    write(outer, AUTOMODEL | config, tensors, "draft_model.pt")
    torch.save({"selected_token_ids": torch.tensor(DRAFT_IDS), "global_step": 30}, outer / "eagle3_meta.pt")
    return outer


def automodel_eagle(outer: Path) -> Path:
    """NeMo AutoModel's EAGLE-1: a layer with an input norm, and a final norm, which no server supports."""
    shapes = {
        "embed_tokens.weight": [VOCAB, HIDDEN],
        "fc.weight": [HIDDEN, 2 * HIDDEN],
        **layer_shapes("layers.0.", HIDDEN, ["input_layernorm"]),
        "norm.weight": [HIDDEN],
    }
    config = NUMBERS | {"architectures": ["LlamaEagleDraftModel"], "num_hidden_layers": 8}
    write(outer / "model", config, randoms(shapes))
    return outer


def speculators(directory: Path, layer: dict | None = None, **config) -> Path:
    """speculators 0.9: two layers, one norm over all aux states, and only what differs from LlamaConfig's defaults."""
    default = {"hidden_act", "max_position_embeddings"}
    inner = {key: value for key, value in NUMBERS.items() if key not in default}
    inner |= {"num_hidden_layers": 2, "head_dim": HEAD_DIM}
    inner |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    stated = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": inner | (layer or {}),
        "draft_vocab_size": len(DRAFT_IDS),
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "norm_before_residual": False,
        "norm_before_fc": True,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,
    }
    deeper = layer_shapes("layers.1.", HIDDEN, ["input_layernorm"])
    verifier = {"verifier_lm_head.weight": [len(DRAFT_IDS), HIDDEN], "verifier_norm.weight": [HIDDEN]}
    tensors = eagle3_tensors("layers.0.", extra={"input_norm.weight": [3 * HIDDEN]} | deeper | verifier)
    return write(directory, stated | config, tensors)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """A head [d] at ``position``: pairs (i, i + d/2) turn by position / theta^(2i/d)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(position / theta ** (2 * i / len(x)), dtype=x.dtype)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def llama_layer(w: Tensors, prefix: str, inputs: torch.Tensor, residual: torch.Tensor, theta: float) -> torch.Tensor:
    """One layer over a causal sequence: what its attention reads [n, width], and the residual [n, h]."""
    q, k, v = (inputs @ w[f"{prefix}self_attn.{name}_proj.weight"].T for name in "qkv")
    rows = []
    for t in range(len(inputs)):
        heads = []
        for head in range(HEADS):
            own, shared = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM), head // (HEADS // KV_HEADS)
            kv = slice(shared * HEAD_DIM, (shared + 1) * HEAD_DIM)
            query = rotate(q[t, own], t, theta)
            scores = torch.stack([query @ rotate(k[s, kv], s, theta) for s in range(t + 1)]) / HEAD_DIM**0.5
            heads.append(scores.softmax(0) @ v[: t + 1, kv])
        rows.append(torch.cat(heads))
    x = residual + torch.stack(rows) @ w[f"{prefix}self_attn.o_proj.weight"].T
    y = norm(x, w[f"{prefix}post_attention_layernorm.weight"])
    gate, up = (y @ w[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (gate * gate.sigmoid() * up) @ w[f"{prefix}mlp.down_proj.weight"].T


def naive_eagle(w: Tensors, embeddings: torch.Tensor, last_hidden_state: torch.Tensor, theta: float) -> torch.Tensor:
    """EAGLE-1's output [n, h] over a sequence, from float64 weights under their published names."""
    x = torch.cat((embeddings, last_hidden_state), dim=-1) @ w["fc.weight"].T + w.get("fc.bias", 0)
    return llama_layer(w, "layers.0.", x, x, theta)


def naive_eagle3(
    w: Tensors, embeddings: torch.Tensor, aux: torch.Tensor, theta: float, layer: str = "midlayer.", outer: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """EAGLE-3's logits [n, V_d] over a sequence, and its output before the final norm [n, h]."""
    if "input_norm.weight" in w:
        aux = norm(aux, w["input_norm.weight"])
    if "fc_norm.0.weight" in w:
        aux = torch.cat([norm(part, w[f"fc_norm.{i}.weight"]) for i, part in enumerate(aux.split(HIDDEN, -1))], -1)
    feature = aux @ w[f"{outer}fc.weight"].T
    first = f"{outer}{layer}"
    token = norm(embeddings, w[f"{first}input_layernorm.weight"])
    inputs = torch.cat((token, norm(feature, w[f"{first}hidden_norm.weight"])), dim=-1)
    x = llama_layer(w, first, inputs, feature, theta)
    if "layers.1.mlp.up_proj.weight" in w:
        x = llama_layer(w, "layers.1.", norm(x, w["layers.1.input_layernorm.weight"]), x, theta)
    return norm(x, w[f"{outer}norm.weight"]) @ w["lm_head.weight"].T, x
