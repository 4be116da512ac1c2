"""The demo's distillation step as one would write it in plain torch: benchmarks/end_to_end.py.

Whole logits, log_softmax, F.kl_div; view-aligned attention by F.linear on views and
scaled_dot_product_attention; transformers' eager experts; torch.optim's own Muon and AdamW.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines_alignment import eager_view_aligned_attention
from deepfusion.models import build, experts
from deepfusion_kernels.nn import StageCollector

ADAMW = {"betas": (0.9, 0.95), "weight_decay": 0.0}


class PlainOptimizers:
    """torch.optim.Muon on every matrix by itself, AdamW on the rest: what the class offers.

    Muon takes 2-D parameters only, so every expert of a stack is a parameter of its own that shares
    the stack's memory.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[nn.Parameter],
        views: Sequence[nn.Parameter],
        lr: float,
    ) -> None:
        self.owners = list(matrices)
        self.slices = [
            [nn.Parameter(one) for one in owner.detach().view(-1, *owner.shape[-2:])]
            for owner in self.owners
        ]
        flat = [one for stack in self.slices for one in stack]
        self.muon = torch.optim.Muon(
            flat, lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            [{"params": list(rest)}, {"params": list(views), "lr": 0.002}], lr, **ADAMW
        )
        self.parameters = [*matrices, *rest, *views]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for owner, stack in zip(self.owners, self.slices, strict=True):
            if owner.grad is None:
                continue
            for one, gradient in zip(stack, owner.grad.view(-1, *owner.shape[-2:]), strict=True):
                one.grad = gradient
        self.muon.step()
        self.adamw.step()
        for parameter in self.parameters:
            parameter.grad = None


def forward(model: nn.Module, ids_BL: Tensor, stages: int) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states, and what layers ceil(j L / J) put out."""
    with StageCollector(build.layers(model), stages) as caught:
        hidden_BLD = build.backbone(model)(ids_BL, use_cache=False).last_hidden_state
        return hidden_BLD, caught.tensors()


def loss(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    views: Sequence[nn.Module],
    ids_BL: Tensor,
    owner_B: Tensor,
    alpha: float,
    supervision: float,
    routed: list[Tensor],
) -> Tensor:
    """CE + KL + alpha L_FM + the routers' cross entropy."""
    stages = views[0].patch_weight.shape[0]
    routed.clear()
    hidden_BLD, student_stages = forward(student, ids_BL, stages)
    logits = F.linear(hidden_BLD[:, :-1], build.head_weight(student))
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), ids_BL[:, 1:].flatten())
    ln_q = logits.log_softmax(-1)
    divergence = feature = hidden_BLD.new_zeros(())
    for owner, teacher in enumerate(teachers):
        rows = (owner_B == owner).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        with torch.no_grad():
            teacher_hidden, teacher_stages = forward(teacher, ids_BL[rows], stages)
            ln_p = F.linear(teacher_hidden[:, :-1], build.head_weight(teacher)).log_softmax(-1)
        divergence = divergence + F.kl_div(ln_q[rows], ln_p, reduction="sum", log_target=True)
        view = views[owner]
        aligned = eager_view_aligned_attention(
            [F.layer_norm(one[rows], one.shape[-1:]) for one in student_stages],
            teacher_stages,
            view.patch_weight,
            view.patch_bias,
            view.qkv_weight,
            view.head_weight,
            view.head_bias,
            num_heads=view.num_heads,
            patch_size=view.patch_size,
            target_norm=view.target_norm,
        )
        feature = feature + aligned * (len(rows) / len(ids_BL))
    domain_T = owner_B.repeat_interleave(ids_BL.shape[1])
    known = domain_T >= 0
    supervised = [F.cross_entropy(one.float()[known], domain_T[known]) for one in routed]
    return (
        cross_entropy
        + divergence / ids_BL[:, 1:].numel()
        + alpha * feature
        + supervision * torch.stack(supervised).mean()
    )


def router_logits(student: nn.Module) -> list[Tensor]:
    """A list to which every router appends its logits as the student runs."""
    logits: list[Tensor] = []
    for router in experts.routers(student):
        router.register_forward_hook(lambda _, __, result: logits.append(result[0]))
    return logits
