"""Fused kernels for distillation, mixture of experts and view-aligned attention."""

# the library loads before the ops that call it
from . import _native as _native  # isort: skip
from .cross_tokenizer import AlignedBatch as AlignedBatch
from .cross_tokenizer import Alignment as Alignment
from .cross_tokenizer import CrossTokenizer as CrossTokenizer
from .cross_tokenizer import align_batch as align_batch
from .cross_tokenizer import paired_rows as paired_rows
from .cross_tokenizer import patch_offsets as patch_offsets
from .nn.alm import alm_distillation as alm_distillation
from .nn.cross_tokenizer import mapped_distillation as mapped_distillation
from .nn.uld import uld_distillation as uld_distillation
from .nn.view_alignment import view_aligned_attention as view_aligned_attention
from .ops.fused_linear_kl.op import fused_linear_kl_distillation as fused_linear_kl_distillation
from .ops.fused_linear_mse.op import fused_linear_mse as fused_linear_mse
from .ops.kl_distillation.op import kl_distillation as kl_distillation
from .ops.moe_dispatch.op import moe_combine as moe_combine
from .ops.moe_dispatch.op import moe_dispatch as moe_dispatch
from .ops.moe_dispatch.op import moe_plan as moe_plan
from .ops.moe_experts.op import moe_experts as moe_experts
from .ops.moe_routing.op import Routing as Routing
from .ops.moe_routing.op import moe_route as moe_route
from .ops.orthogonalise.op import muon_step as muon_step
from .ops.orthogonalise.op import orthogonalise as orthogonalise
from .ops.shared.moe_plan import DispatchPlan as DispatchPlan
from .ops.topk_kl.op import topk_kl_distillation as topk_kl_distillation
from .ops.topk_kl.op import topk_logprobs as topk_logprobs
from .ops.view_aligned_attention.op import multi_stage_attention as multi_stage_attention

__version__ = "0.1.0"
