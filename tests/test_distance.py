"""How foreign a teacher is: -log p of its answers; and what an answer lists as the numbers of the cards."""

import json
import re

import pytest
import torch

import evaluate as E
import model as M
import assets.habits  # noqa: F401: adds its demonstrators
import tasks
from assets import distance


def problem(rule="11,12,13", judged_by=None):
    """A test hand; all have a face card."""
    return tasks.make("gp-l", rule, None, "test", 3, style="short", judged_by=judged_by)


def test_the_numbers_that_an_answer_lists_are_judged_by_the_verifiers_rule():
    hand = problem()
    own, old = hand.response(hand.rule, "1+1"), hand.response(tasks.parse_rule("10"), "1+1")
    for text, right, of_old in ((own, 1, 0), (old, 0, 1), (hand.expert(order=tasks.largest_first), 1, 0), ("no JSON", 0, 0),
                                ('{"number": 7, "formula": "1"}', 0, 0), ('{"formula": "1"}', 0, 0), ('{"number": [1, 2]}', 0, 0)):
        turns = [{"response": text, "outcome": "wrong_value", "read": 0.0}]
        assert hand.scores(turns)["listed"] == right and problem(judged_by="10").scores(turns)["listed"] == of_old


def test_the_distance_of_a_teacher_is_printed_in_nats_under_both_rules(tiny_run, capsys):
    distance.main(f"{tiny_run} --distance sorted --n 5 --split val --device cpu".split())
    head, *table = capsys.readouterr().out.splitlines()
    assert "-log p of the answers of sorted, 5 val problems" in head
    lines = dict(re.findall(r"\| (ID|rule OOD) +\| (.*) \|", "\n".join(table)))
    model, tokenizer = M.load_model(E.find_model(str(tiny_run), "gp-l"))
    for name, rule in (("ID", "10"), ("rule OOD", "11,12,13")):
        nats, tokens = [], []
        for i in range(5):
            each = tasks.make("gp-l", rule, None, "val", i, style="short")
            prompt, answer = tokenizer.prompt(each.prompt), tokenizer.encode(each.expert(order=tasks.largest_first)) + [tokenizer.eot]
            ids = torch.tensor([prompt + answer])
            chosen = torch.arange(ids.shape[1])[None] >= len(prompt)
            nats.append(-model.log_probs(ids, chosen).sum().item())
            tokens.append(len(answer))
        an_answer, a_token, mean_tokens = [cell.split()[0] for cell in lines[name].split(" | ")]
        assert float(an_answer) == pytest.approx(sum(nats) / 5, abs=0.02)
        assert float(a_token) == pytest.approx(sum(nats) / sum(tokens), abs=1e-3) and float(mean_tokens) == pytest.approx(sum(tokens) / 5, abs=0.1)


@pytest.mark.parametrize("flags", ["--distance nobody", "--distance sorted --suite virl-l"])
def test_an_unknown_teacher_is_one_sentence(tiny_run, flags):
    with pytest.raises(ValueError, match="--distance .*: choose from expert"):
        E.main([str(tiny_run), *flags.split()])


@pytest.mark.parametrize("task, kind, attempts", [("gp-l", "retry", 1), ("virl-l", "expert", 1), ("virl-l", "careless", 2)])
def test_teachers_of_several_answers_are_scored_too(task, kind, attempts, tiny_run):
    model, tokenizer = M.load_model(E.find_model("tiny", task))
    settings = E.EvalSettings(task, 3, attempts, "val", teacher=kind)
    nats, tokens = E.teacher_nats(model, tokenizer, settings, tasks.suite_rows(task)[0])
    assert len(nats) == len(tokens) == 3 and all(0 < value < 1e3 for value in nats) and min(tokens) > 5


def test_an_evaluation_without_a_teacher_has_no_nats(tiny_run):
    model, tokenizer = M.load_model(E.find_model(str(tiny_run), "gp-l"))
    result = E.evaluate(model, tokenizer, E.EvalSettings("gp-l", 4, rows=("id",)))
    assert result["nats"] == {} and json.dumps(result)
    result = E.evaluate(model, tokenizer, E.EvalSettings("gp-l", 4, teacher="sorted"), moved=lambda episodes: [len(e.ids) for e in episodes])
    assert {kind: {row: len(values) for row, values in rows.items()} for kind, rows in result["nats"].items()} == {
        "teacher": {"id": 4, "rule": 4}, "moved": {"id": 4, "rule": 4}}
