"""A call captured in a CUDA graph: its replay follows what its inputs hold then."""

from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]


def assert_a_captured_graph_follows(call: Call, change_inputs: Callable[[], None]) -> None:
    """Capture after a warm-up, change the inputs in place, replay: the bits of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        change_inputs()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, call(), strict=True))
