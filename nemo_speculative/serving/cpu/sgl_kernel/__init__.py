"""The functions of ``sgl_kernel`` that SGLang 0.5.23's CPU engine calls for a Llama-like target with an EAGLE draft.

Plain torch code, one request after the other: for testing a checkpoint with SGLang itself, not for serving traffic.
``convert_weight_packed`` is missing on purpose: SGLang looks it up to detect compiled kernels, and without it uses its
own torch code for norms, activations, rotary positions and linear layers.
"""

import torch

from .attention import decode_attention_cpu, extend_attention_cpu
from .slots import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
)
from .trees import build_tree_kernel_efficient_cpu, verify_tree_greedy_cpu

__version__ = "0.5.23+plain.torch"
__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "decode_attention_cpu",
    "extend_attention_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]

# SGLang looks these two up as torch.ops.sgl_kernel.*; an attribute answers as well as a registered operator.
for kernel in (decode_attention_cpu, extend_attention_cpu):
    setattr(torch.ops.sgl_kernel, kernel.__name__, kernel)
