#!/bin/sh
# reasoning-gym's game of 24 does not look at the cards: one formula solves every deal, and 24.5 is 24.
#
# Versions: reasoning-gym 0.1.25, sympy 1.14.0, Python 3.11.
# The question of puzzle24 names four numbers, each to be used once. The reward asks only that the answer holds four numbers of the
# allowed range and that its value, with the part behind the point cut off, is 24. So a policy need learn no more than one sentence. The
# sister task countdown compares the numbers with those of its question, and the value exactly: there the same trick gets 0.05.
# Output seen (mean reward of one answer to 200 deals; to countdown, the answer is "target + 1 - 1"):
#   5 of 200 deals have the numbers 1, 1, 4 and 6
#   6*4*1*1            1.00
#   7*7/2/1  (24.5)    1.00
#   6*4 (two numbers)  0.01
#   the deal's own     1.00
#   countdown          0.05
# Exits with 1 when this has changed. VENV=FOLDER keeps and reuses a virtual environment; without it one is made and deleted.
set -e
[ -n "$VENV" ] || { VENV=$(mktemp -d); trap 'rm -rf "$VENV"' EXIT; }
[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
"$VENV/bin/pip" install -q reasoning-gym==0.1.25 sympy==1.14.0
"$VENV/bin/python" -W ignore - <<'PY'
import sys
import reasoning_gym


def mean_reward(game, answer):
    return sum(game.score_answer(answer(deal), deal) for deal in game) / len(game)


cards = reasoning_gym.create_dataset("puzzle24", size=200, seed=1)
countdown = reasoning_gym.create_dataset("countdown", size=200, seed=1)
fitting = sum(sorted(deal["metadata"]["numbers"]) == [1, 1, 4, 6] for deal in cards)
seen = {"6*4*1*1": mean_reward(cards, lambda deal: "6*4*1*1"), "7*7/2/1  (24.5)": mean_reward(cards, lambda deal: "7*7/2/1"),
        "6*4 (two numbers)": mean_reward(cards, lambda deal: "6*4"), "the deal's own": mean_reward(cards, lambda deal: deal["answer"]),
        "countdown": mean_reward(countdown, lambda deal: f"{deal['metadata']['target']} + 1 - 1")}
print(f"{fitting} of {len(cards)} deals have the numbers 1, 1, 4 and 6")
for name, reward in seen.items():
    print(f"{name:17}  {reward:.2f}")
good = fitting < 20 and [round(reward, 2) for reward in seen.values()] == [1.0, 1.0, 0.01, 1.0, 0.05]
print("as described" if good else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not good)
PY
