#!/bin/sh
# A module without data: torch loads its whole compiler to draw an embedding that has no numbers, and sympy to give it memory.
#
# Versions: torch 2.13.0, Python 3.11, CPU.
# The usual way to read large weights is to make the model on the meta device, then module.to_empty(device=...). Drawing a Linear there is
# done at once. Drawing an Embedding (normal_) goes to a reference in Python whose decorator imports torch._dynamo; to_empty goes to
# one that imports sympy. That happens once a process, but every script of a small model pays it: here that takes as long as
# `import torch`.
# Output seen (modules loaded, seconds; the seconds differ from machine to machine):
#   import torch         2.0 s
#   Linear on meta       0 modules, compiler no, sympy no, 0.0 s
#   to_empty             487 modules, compiler no, sympy yes, 0.6 s
#   Embedding on meta    336 modules, compiler yes, sympy yes, 1.5 s
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$VENV/bin/python" -W ignore - <<'PY'
import sys
import time

began = time.perf_counter()
import torch

print(f"import torch         {time.perf_counter() - began:.1f} s")
found = []


def step(name, work):
    before, began = len(sys.modules), time.perf_counter()
    made = work()
    loaded = ["torch._dynamo" in sys.modules, "sympy" in sys.modules]
    found.append(loaded)
    print(f"{name:20} {len(sys.modules) - before} modules, compiler {'yes' if loaded[0] else 'no'}, sympy {'yes' if loaded[1] else 'no'}, "
          f"{time.perf_counter() - began:.1f} s")
    return made


linear = step("Linear on meta", lambda: torch.nn.Linear(4, 4, device="meta"))
step("to_empty", lambda: linear.to_empty(device="cpu"))
step("Embedding on meta", lambda: torch.nn.Embedding(4, 4, device="meta"))
sys.exit(found != [[False, False], [False, True], [True, True]])
PY
