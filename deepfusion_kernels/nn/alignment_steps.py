"""The two directions of the joined loss, step by step; alignment_node.py makes a node of them.

    X = patches W + c      Q, K, V = X Wqkv      Y = attention
loss = sum_j s_j sum_n v_n |U_j Y_jn + u_j - G_jn|^2 / (M sum v)
"""

from __future__ import annotations

from torch import Tensor

from ..ops.fused_linear_mse.stages import stage_errors
from ..ops.shared import patches
from ..ops.shared.gradients import scaled
from ..ops.view_aligned_attention import op as attention
from ..ops.view_aligned_attention.joined import steps
from ..ops.view_aligned_attention.projection import shift_gradients


def loss_and_kept(
    stages: list[Tensor],
    targets: list[Tensor],
    patch_weight: Tensor,
    patch_bias: Tensor,
    qkv_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    patch_embedding: Tensor | None,
    stage_embedding: Tensor | None,
    offsets_BQ1: Tensor,
    target_offsets: Tensor,
    mask_BL: Tensor | None,
    target_mask: Tensor | None,
    stage_weights: list[float],
    num_heads: int,
    patch_size: int,
    causal: bool,
    target_norm: bool,
    needs_hidden: bool,
    needs_head: bool,
    needs_head_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, then 1 / (M sum v), v, X, QKV, L, dY, delta, dU, du; what is not needed is empty."""
    needs = (needs_hidden, needs_head, needs_head_bias)
    found = steps.at_once(
        stages, targets,
        (patch_weight, patch_bias, qkv_weight, head_weight, head_bias, patch_embedding,
         stage_embedding),
        (offsets_BQ1, target_offsets, mask_BL, target_mask), stage_weights, num_heads, patch_size,
        causal, target_norm, needs, False, backend,
    )  # fmt: skip
    if found is not None:
        loss, factor, v, x, qkv, lse, dy, delta, dhead, dhead_bias = found
        return loss, factor, v, x, qkv, lse, dy, delta, dhead, dhead_bias
    _cuts, target_cuts, valid_BQ, scale_SN, factor, x, qkv, lse, y = steps.attended(
        stages, patch_weight, patch_bias, qkv_weight, patch_embedding, stage_embedding,
        offsets_BQ1, target_offsets, mask_BL, target_mask, targets[0].shape[1],
        head_weight.shape[1], stage_weights, num_heads, patch_size, causal, backend,
    )  # fmt: skip
    sse_SN, dy, dhead, dhead_bias = stage_errors(
        y.flatten(1, 2), head_weight, head_bias, targets, target_cuts, target_mask, scale_SN,
        target_norm, needs, backend,
    )  # fmt: skip
    loss, delta = steps.finished(scale_SN, sse_SN, factor, y, dy, num_heads, backend)
    if not needs_hidden:
        no = lse.new_empty
        return loss, factor, valid_BQ, no(0), no(0), no(0), no(0), no(0), dhead, dhead_bias
    return loss, factor, valid_BQ, x, qkv, lse, dy.view_as(y), delta, dhead, dhead_bias


def gradients(
    upstream: Tensor,
    kept: list[Tensor],
    stages: list[Tensor],
    patch_weight: Tensor,
    qkv_weight: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    num_heads: int,
    patch_size: int,
    causal: bool,
    needs_stages: list[bool],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """dF of every stage, then what `needs` names: dW, dc, dWqkv, dU, du, dpos."""
    factor, valid_BQ, x, qkv, lse, dy, delta, dhead, dhead_bias, *rows = kept
    needs_patch_weight, needs_bias, needs_qkv, _, _, needs_position = needs
    of_hidden = [*needs_stages, needs_patch_weight, needs_bias, needs_qkv, needs_position]
    if any(of_hidden) or rows:
        found = steps.gradients(
            upstream, kept, stages, patch_weight, qkv_weight, offsets_BQ1, mask_BL, num_heads,
            patch_size, causal, of_hidden, backend,
        )  # fmt: skip
        if found is not None:
            return found
    impl, dtype = attention.IMPLS[backend], patch_weight.dtype
    g = upstream * factor
    heads = [scaled(dhead, g, dtype), scaled(dhead_bias, g, dtype)]
    if not any(of_hidden):
        *nothing, last = [x.new_empty(0, dtype=dtype) for _ in range(len(stages) + 4)]
        return [*nothing, *heads, last]
    D = patch_weight.shape[1]
    dqkv = impl.attention_backward(
        qkv, lse, dy, delta, valid_BQ, num_heads, causal,
        attention.default_scale(D, num_heads), g,
    )  # fmt: skip
    needs_x = any(needs_stages) or needs_patch_weight or needs_bias or needs_position
    dx, dqkv_weight = attention.projection_backward(dqkv, x, qkv_weight, needs_x, needs_qkv)
    del dqkv
    cuts = offsets_BQ1.contiguous()
    if not cuts.is_cpu:
        cuts = patches.checked_offsets(cuts, stages[0].shape[1], "", "")
    if needs_x:
        dstages, dpatch_weight = impl.project_backward(
            stages, patch_weight, dx, cuts, mask_BL, patch_size, needs_stages, needs_patch_weight
        )
    else:
        *dstages, dpatch_weight = [x.new_empty(0) for _ in range(len(stages) + 1)]
    dbias, dposition = shift_gradients(dx, needs_bias, needs_position)
    return [*dstages, dpatch_weight, dbias, dqkv_weight, *heads, dposition]
