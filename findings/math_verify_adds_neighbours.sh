#!/bin/sh
# math-verify adds two whole numbers that stand side by side: (4)(6) is 10, and "7 8 9" is 24.
#
# Versions: math-verify 0.9.0, latex2sympy2-extended 1.11.0, sympy 1.14.0, Python 3.11.
# A whole number before a fraction is a mixed number, a sum: that is meant. But any two whole numbers side by side are read so, in
# brackets or not. A product written the school way gets nothing, 10(14) gets the reward of 24, and bare numbers are worth their sum.
# As soon as one factor is more than a number, 4(5+1), it is a product again.
# Where the answer is a row of numbers (sort these, list the cards), each order of them is right, and so is their sum.
# Output seen:
#   gold 24       \boxed{4 \cdot 6}  right
#   gold 24       \boxed{4(5+1)}     right
#   gold 24       \boxed{(4)(6)}     wrong
#   gold 24       \boxed{10(14)}     right
#   gold 24       \boxed{7 8 9}      right
#   gold 1\ 2\ 3  \boxed{1\ 2\ 3}    right
#   gold 1\ 2\ 3  \boxed{3\ 1\ 2}    right
#   gold 1\ 2\ 3  \boxed{6}          right
#   gold 1, 2, 3  \boxed{6}          wrong
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
"$VENV/bin/python" -W ignore - <<'PY'
import sys
from math_verify import parse, verify

SEEN = [("24", r"4 \cdot 6", True), ("24", "4(5+1)", True), ("24", "(4)(6)", False), ("24", "10(14)", True), ("24", "7 8 9", True),
        (r"1\ 2\ 3", r"1\ 2\ 3", True), (r"1\ 2\ 3", r"3\ 1\ 2", True), (r"1\ 2\ 3", "6", True), ("1, 2, 3", "6", False)]
good = True
for gold, answer, expected in SEEN:
    boxed = rf"\boxed{{{answer}}}"
    right = verify(parse(f"${gold}$"), parse(boxed))
    print(f"gold {gold:8}  {boxed:17}  {'right' if right else 'wrong'}")
    good &= right == expected
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY
