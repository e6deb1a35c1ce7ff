"""The GPU's code paths without a GPU: every tensor of a made-up device "gpu" is one in memory that says so.

    python tests/simulate_gpu.py            all checks, one line each; or some: python tests/simulate_gpu.py RL

An operation that mixes such a tensor with one in plain memory is refused, as a GPU would refuse it (an index in plain memory too, which
a GPU copies to itself). While a decoding step is captured, asking the device for a value or copying to it is refused too, and the
step is replayed as a CUDA graph replays. So run the checks of tests/gpu_checks.py and, in bfloat16, the scripts: SFT and RL in text
and in pictures, adapters, a KL, recomputation, resume, evaluations. The numbers come from the CPU's kernels: speed, memory and
rounding on a GPU stay unknown.
"""
import contextlib
import importlib
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_graph import Capture, FakeGraph, noting  # noqa: E402

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
ASKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.equal.default,
        aten.repeat_interleave.Tensor}


class OnGpu(torch.Tensor):
    """A tensor that says "gpu:0"; `memory` holds its numbers."""
    is_cuda = True

    @staticmethod
    def __new__(cls, memory):
        return torch.Tensor._make_wrapper_subclass(cls, memory.shape, strides=memory.stride(), storage_offset=memory.storage_offset(),
                                                   dtype=memory.dtype, device="gpu:0", requires_grad=False)

    def __init__(self, memory):
        self.memory = memory

    def data_ptr(self):
        return self.memory.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.memory.__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnGpu({self.memory})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """func with what is on "gpu" or asks for it, on the CPU."""
    there, here = [], []

    def memory(x):
        if isinstance(x, OnGpu):
            there.append(x)
            return x.memory
        if isinstance(x, torch.Tensor):
            here.append(x)
        return [*map(memory, x)] if isinstance(x, (list, tuple)) else x

    args, kwargs = memory(args), {name: memory(x) for name, x in kwargs.items()}
    target = kwargs.get("device") and torch.device(kwargs["device"]).type
    if there and func not in MOVES and any(x.dim() for x in here):
        raise RuntimeError(f"{func}: {tuple(there[0].shape)} is on the device, {tuple(here[0].shape)} is not")
    if Capture.running and (func in ASKS or func in MOVES and here or target == "cpu"):
        raise RuntimeError(f"{func}: while a step is captured, the device is asked for a value or a copy")
    if func is aten._fused_sdp_choice.default:
        return 0  # plain products
    kwargs = kwargs | {"device": torch.device("cpu")} if target else kwargs
    if func is aten.bmm.dtype:
        out = torch.bmm(args[0].float(), args[1].float())
    else:
        out = func(*args, **kwargs)
    if target == "cpu" or not there and target != "gpu" or func is aten._local_scalar_dense.default:
        return out
    known = {id(x.memory): x for x in there}  # what was changed in place stays the same tensor

    def named(x):
        if isinstance(x, torch.Tensor):
            return known[id(x)] if id(x) in known else OnGpu(x)
        return [*map(named, x)] if isinstance(x, (list, tuple)) else x
    return tuple(named(out)) if isinstance(out, tuple) else named(out)


class Gpu(TorchDispatchMode):
    """Under which factory functions and moves to "gpu" make OnGpu tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def inference_mode(mode=True):
    """torch.inference_mode without its tensors that keep no version: for these torch wants memory of its own."""
    return torch.no_grad()


class Backend(backend_registration._DummyBackendModule):
    """What torch asks the module of a device, as it asks torch.cuda."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        """Nothing is drawn from a stream of the device's own."""

    def device(self, index):
        return contextlib.nullcontext()


class Generator(torch.Generator):
    """A torch.Generator for any device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextlib.contextmanager
def simulated():
    """All of the above in place of torch.cuda. The five files must not have been imported yet."""
    backend_registration._setup_privateuseone_for_python_backend("gpu", Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="gpu") is made in memory, then moved
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.inference_mode, torch.Generator = inference_mode, Generator
    torch.cuda.CUDAGraph, torch.cuda.graph, torch.Tensor.pin_memory = FakeGraph, Capture, lambda x: x
    import evaluate
    import model as M
    import train_rl
    import train_sft
    M.StepGraph.__init__ = noting(M.StepGraph.__init__)
    M.MULTIPLE["gpu"] = M.MULTIPLE.pop("cuda")
    for module in (evaluate, train_sft, train_rl):
        module.device_and_dtype = lambda device: ("gpu", torch.bfloat16)
    with Gpu(), torch.autograd.set_multithreading_enabled(False):  # no thread of its own for the device
        yield


def check_refusals():
    """That the simulation refuses what it says, and computes what is right."""
    there, here = torch.arange(6.0, device="gpu").view(2, 3), torch.ones(2, 3)
    assert (there @ there.mT).cpu().tolist() == [[5, 14], [14, 50]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there.sum()
    for mixed in (lambda: there + here, lambda: there[torch.tensor([1])], lambda: torch.cat([there, here])):
        refused(mixed)
    for asked in (lambda: there.sum().item(), lambda: there.cpu(), lambda: there.copy_(here), lambda: bool(there.any()), there.nonzero):
        asked()  # well outside of a graph
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            refused(asked)


def refused(work):
    """Whether work raises RuntimeError."""
    try:
        work()
    except RuntimeError:
        return
    raise AssertionError("not refused")


def scripts(folder):
    """(name, module, flags) of runs of the scripts, each with what it goes on from."""
    short = "--device cuda --evals 1 --eval-n 2 --eval-rows id --seed 1 --max-new-tokens 12"
    vl, text = "--task gp-vl --model assets/tiny-gp-vl", "--task gp-l --model assets/tiny-gp-l"
    walk = "--task virl-vl --model assets/tiny-virl-vl"
    sft, rl = "--steps 2 --batch 6", "--steps 2 --problems 2 --group 3"
    yield "SFT in text", "train_sft", f"{text} {sft} {short} --eval-moved --eval-teacher sorted --out {folder}/sft"
    yield "SFT goes on", "train_sft", f"--resume {folder}/sft --steps 3"
    yield "RL in text", "train_rl", f"{text} {rl} {short} --out {folder}/rl"
    yield "RL with a KL, adapters, recomputation", "train_rl", (
        f"{text} {rl} {short} --lora-rank 4 --kl-coef 0.1 --recompute --micro-batch 2 --attempts 2 --epochs 2 --clip-eps 0.2 --out {folder}/lora")
    yield "it goes on", "train_rl", f"--resume {folder}/lora --steps 3"
    yield "SFT in pictures, adapters", "train_sft", f"{vl} {sft} {short} --lora-rank 4 --out {folder}/vl"
    yield "RL in pictures", "train_rl", f"{vl} {rl} {short} --init {folder}/vl --lora-rank 4 --out {folder}/rl-vl".replace("--model assets/tiny-gp-vl", "")
    yield "RL in pictures, the tower trained", "train_rl", f"{vl} {rl} {short} --train decoder projector tower --out {folder}/tower"
    yield "RL of walks", "train_rl", f"{walk} --steps 1 --problems 1 --group 2 {short} --attempts 2 --out {folder}/walk".replace("--evals 1", "--evals 0")
    yield "an evaluation", "evaluate", f"{folder}/lora --n 2 --k 2 --max-new-tokens 12 --device cuda --out {folder}/evaluation"
    yield "an answer", "evaluate", f"{folder}/vl --device cuda --ask hello --image assets/walk.png --max-new-tokens 9"


def main():
    failed = False
    with simulated(), tempfile.TemporaryDirectory() as folder:
        import gpu_checks
        gpu_checks.DEVICE = "gpu"
        works = [("check_refusals", check_refusals), ("check_graph", partial(gpu_checks.check_graph, ((True, 1.0, 3, 5),)))]
        works += [(check.__name__, check) for check in (gpu_checks.check_loading, gpu_checks.check_rounding, gpu_checks.check_bfloat16)]
        works += [(name, partial(importlib.import_module(module).main, flags.split()))
                  for name, module, flags in scripts(folder)]
        for name, work in works:
            if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
                continue
            before, began = sum(graph.replays for graph in FakeGraph.made), time.time()
            try:
                with contextlib.redirect_stdout(None):
                    work()
                print(f"ok: {name}, {sum(graph.replays for graph in FakeGraph.made) - before} steps replayed, {time.time() - began:.1f} s", flush=True)
            except Exception:
                failed = True
                print(f"FAILED: {name}: {traceback.format_exc()[-2500:]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
