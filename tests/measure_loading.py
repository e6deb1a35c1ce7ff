"""Speed and peak memory of load_model on a synthetic checkpoint, in fresh processes; by hand, not in `make test`:

    python tests/measure_loading.py [GB, default 1.5] [directory for the files, default a temporary one]

"read" is what loading is compared with: read_bytes of the same files, all kept. With the files in the page cache, and
after they were dropped from it (posix_fadvise). bfloat16 is the type in the files; float32 makes twice as much of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import os, sys, time
sys.path.insert(0, {root!r})
import torch, model as M
from pathlib import Path
directory, what, cold = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "cold"
torch.set_num_threads(1)
def peak():  # unlike ru_maxrss not inherited from the parent
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
files = sorted(directory.glob("*.safetensors"))
size = sum(f.stat().st_size for f in files)
for f in files if cold else ():
    with open(f, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before, start, cpu, weights = peak(), time.perf_counter(), time.process_time(), size
if what == "read":
    kept = [f.read_bytes() for f in files]
else:
    model, _ = M.load_model(directory, getattr(torch, what))
    weights = sum(p.nbytes for p in model.parameters())
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(f"{{what:10}} {{'cold' if cold else 'cached':8}} {{seconds:6.2f}} s  {{size / seconds / 1e9:6.2f}} GB/s of files  "
      f"{{cpu:6.2f}} s of CPU  weights {{weights / 1e9:5.2f}} GB  peak {{(peak() - before) / weights:5.2f}} x weights", flush=True)
"""


def main():
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 1.5
    directory = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    sys.path.insert(0, str(ROOT))
    import torch

    import model as M
    from assets import make_base
    layers = max(1, round(size * 1e9 / 2 / (4096 * (4096 * 2 + 1024 * 2 + 3 * 14336))))
    config = M.Config(M.TextConfig(32000, 4096, 14336, layers, 32, 8, ()), M.VisionConfig(96, 4, 288, 4, 1, 8, 32, 4, (1, 2)))
    torch.set_default_dtype(torch.bfloat16)
    model = M.LlamaVision(config).to(torch.bfloat16)
    tokenizer = make_base.train_tokenizer(["Q 3 10 4, JQK=11,12,13, make 24"] * 3, 300)
    M.save_model(model, tokenizer, directory, shard_bytes=5 * 10**8)
    print(f"{sum(p.nbytes for p in model.parameters()) / 1e9:.2f} GB in {len(list(directory.glob('*.safetensors')))} shards")
    os.sync()
    for cache in ("cached", "cold"):
        for what in ("read", "bfloat16", "read", "bfloat16", "read", "bfloat16", "float32"):
            subprocess.run([sys.executable, "-c", CHILD.format(root=str(ROOT)), str(directory), what, cache], check=True)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
