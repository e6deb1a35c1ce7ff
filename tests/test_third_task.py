"""A task that the five files do not know: one class and one row are enough to train, evaluate and report it."""
import json
import random

import pytest

import evaluate as E
import tasks
import train_rl as RL
import train_sft as SFT
from assets import report


# ---- the whole task

class Sums(tasks.Problem):
    """Two numbers are to be added; the rule "less" asks for one less than the sum."""
    WORDS = tasks.Words("sums", "the sum", "one less", "sums of the same value")

    def __init__(self, a, b, rule, judged_by, attempts):
        self.a, self.b, self.rule, self.judged_by, self.attempts = a, b, rule, judged_by, attempts
        self.prompt, self.cls, self.tried = f"{a}+{b}, {rule}", str(a + b), 0

    @classmethod
    def make(cls, *, rule, split, index, attempts, judged_by, **more):
        rng = random.Random(f"sums/{split}/{index}")
        if rule not in ("sum", "less"):
            raise ValueError(f"{rule!r} is no rule for sums: write sum or less.")
        return cls(rng.randint(1, 9), rng.randint(1, 9), rule, judged_by or rule, attempts)

    def value(self, rule):
        return str(self.a + self.b - (rule == "less"))

    def expert(self):
        return self.value(self.rule)

    def step(self, response):
        right = response.strip() == self.value(self.judged_by)
        self.tried += 1
        self.done = right or self.tried == self.attempts
        return tasks.Step(float(right), self.done, "" if right else "No.", "correct" if right else "wrong_value")


BASE = E.find_model("tiny", "gp-l")
ROW = tasks.Task(Sums, "sum", None, (tasks.Row("id", "sum"), tasks.Row("rule", "less"), tasks.Row("fake", "less", "sum")))

# ---- (36 lines)


def test_a_third_task_takes_one_class_and_one_row(monkeypatch, tmp_path, capsys):
    """Warm-up, both arms, evaluation, report, in the tiny base of another task."""
    monkeypatch.setitem(tasks.TASKS, "sums", ROW)
    common = "--task sums --eval-n 12 --eval-split test --device cpu --seed 1"
    study = tmp_path / "study"
    SFT.main(f"{common} --init {BASE} --out {study / 'warmup'} --steps 50 --batch 48 --lr 3e-3 --evals 1".split())
    SFT.main(f"{common} --init {study / 'warmup'} --out {study / 'sft'} --steps 3 --batch 16 --lr 1e-3".split())
    RL.main(f"{common} --init {study / 'warmup'} --out {study / 'rl'} --steps 3 --problems 8 --group 4 --max-new-tokens 4 "
            "--attempts 2".split())
    losses = [json.loads(line)["loss"] for line in (study / "warmup" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    assert any(json.loads(line)["reward"] > 0 for line in (study / "rl" / "metrics.jsonl").read_text().splitlines())
    result = E.main(f"{study / 'rl'} --suite sums --n 12 --max-new-tokens 4 --out {study / 'base'}".split())
    assert sum(result["rows"]["id"]["greedy"]["first"]) >= 6
    assert set(result["rows"]) == {"id", "rule", "fake"} and len(result["rows"]["id"]["greedy"]["first"]) == 12
    assert all(told + by_old_rule <= 1 for told, by_old_rule in zip(*(
        result["rows"][row]["greedy"]["first"] for row in ("rule", "fake"))))  # no answer is right by both rules
    report.main([str(study)])
    page, said = (study / "report.html").read_text(), capsys.readouterr().out
    assert "12 held-out sums" in page and "RL, end" in said and "one less" in page
    with pytest.raises(ValueError, match="write sum or less"):
        SFT.main(f"{common} --init {BASE} --out {tmp_path / 'new'} --rule product".split())


def test_the_words_of_its_mistakes(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "sums", ROW)
    with pytest.raises(ValueError, match="--demonstrators clever"):
        SFT.parse_args(f"--task sums --model {BASE} --demonstrators clever".split())
    with pytest.raises(ValueError, match="no visual"):
        tasks.make("sums", visual="red")
    assert "sums" in tasks.suite_names() and tasks.make("sums", split="test", index=3).demonstrate("expert", random) == [
        tasks.make("sums", split="test", index=3).expert()]
