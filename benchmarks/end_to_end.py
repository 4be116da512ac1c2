"""`python benchmarks/end_to_end.py`: a distillation step of the demo, ours and plain torch.

The demo's recipe is "direct": four proxies of three architectures teach a mixture of four experts.
L = L_CE + beta L_KL + alpha L_FM + mu L_supervision, backward to every weight, clipping, Muon and
AdamW; timed whole, and without what follows backward. The plain side: benchmarks/plain_step.py.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from benchmarks import plain_step
from benchmarks.run import RESULTS, environment
from deepfusion.config_tables import DistillConfig, MergeConfig
from deepfusion.models import build
from deepfusion.server.fused import fused_experts
from deepfusion.server.merge import merge
from deepfusion.server.router import RouterTap, supervision_loss
from deepfusion.server.teaching import Teaching
from deepfusion.server.tune import freeze
from deepfusion.server.views import make_views
from deepfusion.training import adamw, descend, make_optimizer, matrices_of
from deepfusion_kernels.bench.timing import interleaved, peak_extra_bytes

BATCH, LENGTH, VOCABULARY = 8, 128, 2048
PROXIES = ("gpt2", "llama", "qwen2", "gpt2")
SUPERVISION = 0.1
# too small to change what is computed from step to step
LR = 1e-6

Step = Callable[[], None]


class Demo:
    """Models, text and settings of one side; both sides draw the same."""

    def __init__(self) -> None:
        self.distill, settings = DistillConfig(), MergeConfig(router_init="normal")
        base = build.build("qwen2-base", VOCABULARY, torch.Generator().manual_seed(1), LENGTH)
        states = [base.state_dict()] * len(PROXIES)
        self.student = merge(states, base.config, settings, 7).train()
        freeze(self.student, "all", settings)
        self.teachers = [
            build.build(name, VOCABULARY, torch.Generator().manual_seed(2 + i), LENGTH).eval()
            for i, name in enumerate(PROXIES)
        ]
        self.views = [
            made
            for i, teacher in enumerate(self.teachers)
            if (made := make_views(self.student, teacher, self.distill, 7, str(i))) is not None
        ]
        draw = torch.Generator().manual_seed(5)
        self.ids_BL = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=draw)
        self.owner_B = torch.arange(BATCH) * len(PROXIES) // BATCH

    @property
    def view_parameters(self) -> list[nn.Parameter]:
        return [parameter for view in self.views for parameter in view.parameters()]

    def forget_gradients(self) -> None:
        for module in (self.student, *self.views):
            module.zero_grad(set_to_none=True)


@contextmanager
def ours(demo: Demo, kernels: str) -> Iterator[tuple[Callable[[], Tensor], Step]]:
    """The driver's loss, and what it does after backward."""
    distill = demo.distill
    teaching = Teaching(
        demo.student, demo.teachers, demo.views, distill.alpha, distill.beta,
        distill.temperature, distill.num_stages, distill.student_norm, kernels,
    )  # fmt: skip
    optimizers = make_optimizer("muon", *matrices_of(demo.student), LR)
    optimizers.append(adamw([{"params": demo.view_parameters, "lr_scale": 0.1}], LR))
    parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    with RouterTap(demo.student) as tap, fused_experts(demo.student, kernels):

        def loss() -> Tensor:
            tap.clear()
            # step 1 is not a multiple of TERMS_EVERY: no extra pass to record the terms
            terms = teaching.loss(demo.ids_BL, demo.owner_B, 1)
            domain_T = demo.owner_B.repeat_interleave(LENGTH)
            routed = supervision_loss(demo.student, tap, domain_T, 1)
            return terms["loss"] + SUPERVISION * routed

        yield loss, lambda: descend(parameters, optimizers, LR, 1.0)


def plain(demo: Demo) -> tuple[Callable[[], Tensor], Step]:
    """The same in plain torch."""
    demo.student.set_experts_implementation("eager")
    optimizers = plain_step.PlainOptimizers(*matrices_of(demo.student), demo.view_parameters, LR)
    logits = plain_step.router_logits(demo.student)
    settings = (demo.distill.alpha, SUPERVISION, logits)

    def loss() -> Tensor:
        return plain_step.loss(
            demo.student, demo.teachers, demo.views, demo.ids_BL, demo.owner_B, *settings
        )

    return loss, optimizers.step


def variants(name: str, demo: Demo, loss: Callable[[], Tensor], step: Step) -> dict[str, Step]:
    """The step whole, and without its optimiser."""

    def backward() -> None:
        demo.forget_gradients()
        loss().backward()

    def whole() -> None:
        backward()
        step()

    return {name: whole, f"{name}, no optimiser": backward}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    sides = Demo(), Demo()
    device = torch.device("cpu")
    with ours(sides[0], "auto") as mine:
        theirs = plain(sides[1])
        losses = [float(loss().detach()) for loss, _ in (mine, theirs)]
        assert abs(losses[0] - losses[1]) < 1e-4 * losses[1], f"two different losses: {losses}"
        calls = variants("ours", sides[0], *mine) | variants("plain torch", sides[1], *theirs)
        times = interleaved(calls, device, repeats=20)
        extra = {name: peak_extra_bytes(call, device) / 2**20 for name, call in calls.items()}
    rows = [{"variant": name, **vars(times[name]), "extra_mib": extra[name]} for name in calls]
    for row, other in zip(rows, [*rows[2:], *rows[:2]], strict=True):
        print(
            f"{row['variant']:27} {row['median_ms']:7.1f} ms "
            f"({row['p20_ms']:.1f}-{row['p80_ms']:.1f})  {row['extra_mib']:7.1f} MiB  "
            f"{other['median_ms'] / row['median_ms']:.2f}x the other side's speed"
        )
    facts = environment(device)
    folder = RESULTS / facts["device"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "end_to_end.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
