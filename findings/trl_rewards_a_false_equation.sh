#!/bin/sh
# TRL's accuracy_reward pays in full for a false equation, if its right-hand side is the answer.
#
# Versions: trl 1.16.0, math-verify 0.9.0, torch 2.13.0, transformers 5.23.0, Python 3.11.
# math-verify compares the right-hand side of an equation with a gold answer that is a number: "x = 24" is 24. It does not look at the
# left-hand side, even where that is a number and another one. Where a formula is the answer, as in the game of 24, a policy need
# only learn to write "= 24" behind any formula to get every reward; the same formula alone gets none.
# Output seen (gold 24):
#   \boxed{(13-10)*2*4}      1.0
#   \boxed{7+8}              0.0
#   \boxed{7+8=24}           1.0
#   \boxed{(13-10)*2=24}     1.0
#   \boxed{24=7+8}           0.0
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q torch==2.13.0 transformers==5.23.0 trl==1.16.0 math-verify==0.9.0
"$VENV/bin/python" -W ignore - <<'PY'
import sys
from trl.rewards import accuracy_reward

want = {r"\boxed{(13-10)*2*4}": 1.0, r"\boxed{7+8}": 0.0, r"\boxed{7+8=24}": 1.0, r"\boxed{(13-10)*2=24}": 1.0, r"\boxed{24=7+8}": 0.0}
seen = {}
for text in want:
    seen[text], = accuracy_reward([[{"role": "assistant", "content": text}]], ["24"])
    print(f"{text:24} {seen[text]}")
good = seen == want
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY
