"""torch.cuda.CUDAGraph and torch.cuda.graph where there is no GPU, for the steps that model.py captures."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeGraph(TorchDispatchMode):
    """A CUDA graph on the CPU: capturing notes every operation with the tensors it was given and gave, replaying computes these
    again into the same memory. Whatever the step did in Python is frozen, and asking for a value is an error, as there."""
    made, in_use = [], ()

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0
        FakeGraph.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a captured step asks the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # views and operations in place have written there already


class Capture:
    """torch.cuda.graph: what is computed while capturing is not computed, so all that it wrote is put back."""
    running = 0

    def __init__(self, graph):
        self.graph = graph

    def __enter__(self):
        self.kept = [t.clone() for t in FakeGraph.in_use]
        Capture.running += 1
        self.graph.__enter__()

    def __exit__(self, *error):
        self.graph.__exit__(*error)
        Capture.running -= 1
        for t, kept in zip(FakeGraph.in_use, self.kept):
            t.copy_(kept)


def noting(made):
    """The given StepGraph.__init__, which tells FakeGraph too which tensors are in use."""
    def init(self, key, tensors, kv):
        FakeGraph.in_use = tensors
        made(self, key, tensors, kv)
    return init
