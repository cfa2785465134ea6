"""Sums that are exact enough: in bfloat16 the small terms of a long sum would vanish."""

import torch


def exact(dtype: torch.dtype) -> torch.dtype:
    """What terms of ``dtype`` add up in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``, where ``total`` has the :func:`exact` type: [n, m] or [B, n, m], like ``a`` and ``b``."""
    if total.dtype != a.dtype:
        total.add_(a @ b)
    elif total.dim() == 2:
        total.addmm_(a, b)
    else:
        total.baddbmm_(a, b)
