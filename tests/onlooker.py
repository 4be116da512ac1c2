"""A mode that sees every operation: a door then goes through its opaque op."""

from torch.utils._python_dispatch import TorchDispatchMode


class Onlooker(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
