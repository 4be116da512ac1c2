"""Fused kernels for distillation, mixture of experts and view-aligned attention."""

# the library loads before the ops that call it
from . import _native as _native  # isort: skip
# kl_distillation
# fused_linear_kl
# topk_kl
# moe_routing
# moe_dispatch
# moe_experts
# view_aligned_attention
# fused_linear_mse

__version__ = "0.1.0"
