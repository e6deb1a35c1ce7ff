"""The scripts on a device that is not the CPU: see simulate_gpu.py."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch is too old for it")
def test_everything_runs_on_a_device_that_is_not_the_cpu():
    done = subprocess.run([sys.executable, HERE / "simulate_gpu.py"], capture_output=True, text=True, cwd=HERE.parent,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok: ")]
    assert len(lines) == 16 and sum(", 0 steps replayed" not in line for line in lines) >= 11, done.stdout
