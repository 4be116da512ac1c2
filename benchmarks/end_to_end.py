"""`python benchmarks/end_to_end.py`: a whole distillation step of the demo, ours and plain eager.

Forward of teacher and student, L_CE + alpha L_FM + beta L_KL, backward to every weight of student
and views; no optimiser. The eager side is what one would write in torch: whole logits, log_softmax,
the view-aligned attention by Conv1d-free view GEMMs and scaled_dot_product_attention.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines import eager_view_aligned_attention
from benchmarks.run import RESULTS, environment
from deepfusion.config_tables import DistillConfig
from deepfusion.models import build
from deepfusion.server.teaching import Teaching
from deepfusion.server.views import make_views
from deepfusion_kernels.bench.timing import interleaved, peak_extra_bytes
from deepfusion_kernels.nn import StageCollector

BATCH, LENGTH, VOCABULARY = 8, 128, 2048
ALPHA, STAGES = 0.05, 4


def eager_step(student: nn.Module, teacher: nn.Module, views: nn.Module, ids_BL: Tensor) -> None:
    """The step as plain torch."""
    with StageCollector(build.layers(student), STAGES) as caught:
        hidden = build.backbone(student)(ids_BL, use_cache=False).last_hidden_state[:, :-1]
        student_stages = caught.tensors()
    logits = F.linear(hidden, build.head_weight(student)).flatten(0, 1)
    with torch.no_grad(), StageCollector(build.layers(teacher), STAGES) as caught:
        teacher_hidden = build.backbone(teacher)(ids_BL, use_cache=False).last_hidden_state[:, :-1]
        teacher_stages = caught.tensors()
        teacher_logits = F.linear(teacher_hidden, build.head_weight(teacher)).flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, ids_BL[:, 1:].flatten())
    divergence = F.kl_div(
        logits.log_softmax(-1),
        teacher_logits.log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    feature = eager_view_aligned_attention(
        student_stages,
        teacher_stages,
        views.patch_weight,
        views.patch_bias,
        views.qkv_weight,
        views.head_weight,
        views.head_bias,
        num_heads=views.num_heads,
        patch_size=views.patch_size,
    )
    (cross_entropy + divergence + ALPHA * feature).backward()


def main() -> int:
    torch.manual_seed(0)
    student = build.build("qwen2-base", VOCABULARY, torch.Generator().manual_seed(1), LENGTH)
    teacher = build.build("gpt2", VOCABULARY, torch.Generator().manual_seed(2), LENGTH)
    views = make_views(
        student, teacher, DistillConfig(alpha=ALPHA, target_norm=False), 7, "benchmark"
    )
    assert views is not None, "alpha > 0 gives views"
    ids_BL = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    owner_B = torch.zeros(BATCH, dtype=torch.int64)

    def ours(kernels: str) -> Callable[[], None]:
        teaching = Teaching(student, [teacher], [views], ALPHA, 1.0, kernels=kernels)

        def step() -> None:
            # step 1 is not a multiple of TERMS_EVERY: no extra pass to record the terms
            teaching.loss(ids_BL, owner_B, 1)["loss"].backward()

        return step

    def cleared(step: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            for module in (student, views):
                module.zero_grad(set_to_none=True)
            step()

        return call

    variants = {
        "ours": cleared(ours("auto")),
        "reference": cleared(ours("reference")),
        "eager": cleared(lambda: eager_step(student, teacher, views, ids_BL)),
    }
    device = torch.device("cpu")
    times = interleaved(variants, device, repeats=20)
    rows = []
    for name, timing in times.items():
        extra = peak_extra_bytes(variants[name], device) / 2**20
        rows.append({"variant": name, **vars(timing), "extra_mib": extra})
        ratio = timing.median_ms / times["ours"].median_ms
        print(
            f"{name:10} {timing.median_ms:7.1f} ms ({timing.p20_ms:.1f}-{timing.p80_ms:.1f})  "
            f"{extra:7.1f} MiB  {ratio:.2f}x ours"
        )
    facts = environment(device)
    folder = RESULTS / facts["device"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "end_to_end.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
