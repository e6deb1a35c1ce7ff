"""The game of assets/play.py: scripted sessions of the shipped bases, through standard input."""
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tasks
from assets import play

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def session(monkeypatch, capsys):
    """A function that plays: (arguments, lines that are typed) -> what is printed."""
    def run(argv, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        play.main(argv.split())
        return capsys.readouterr().out
    return run


def rounds(printed):
    """The rounds of a session: the text from each title to the score."""
    return re.findall(r"^--- .*?first attempts right so far[^\n]*", printed, re.MULTILINE | re.DOTALL)


def test_a_session_deals_and_the_marks_are_the_verifiers(session):
    shown = rounds(session("tiny", "next", "", "index 7"))
    assert [re.search(r"test (\d+)", each)[1] for each in shown] == ["0", "1", "2", "7"]
    right = 0
    for index, text in zip((0, 1, 2, 7), shown):
        problem = tasks.make("gp-l", "10", split="test", index=index, style="short")
        assert problem.prompt in text
        answer = " ".join(re.search(r"\{.*?\}", text, re.DOTALL)[0].split())
        step = problem.step(answer)
        right += step.outcome == "correct"
        assert ("\u2713 RIGHT" in text, "\u2717 WRONG" in text) == (step.outcome == "correct", step.outcome != "correct")
        assert step.feedback in text and f"tiny {right} of " in text
    assert 0 < right < 4  # both marks were seen


def test_a_new_rule_keeps_the_cards_and_changes_the_prompt(session):
    first, other, queen, dealt = rounds(session("tiny", "deal K 7 4 A", "rule 11,12,13", "Q=3", "rule 10/cards=5"))[1:]
    assert "K 7 4 A, JQK=10,10,10, make 24" in first and "K 7 4 A, JQK=11,12,13, make 24" in other
    assert "K 7 4 A, JQK=11,3,13, make 24" in queen
    assert len(re.search(r"^(.*), JQK=10,10,10", dealt, re.MULTILINE)[1].split()) == 5  # a rule that needs other cards


def test_what_readme_says_to_type_changes_the_rule(session):
    typed, other = re.findall(r'--play .*?"(.*?)".*?"(.*?)"', (ROOT / "README.md").read_text())[0]
    assert "A 9 J 5, JQK=11,10,10, make 24" in rounds(session("tiny", typed))[1] and play.HELP in session("tiny", other)


def test_an_index_deals_again_after_typed_cards(session):
    _, typed, after = rounds(session("tiny", "Q 7 4 A", "index 0"))
    assert "Q 7 4 A, JQK" in typed and tasks.make("gp-l", split="test", index=0, style="short").prompt in after


def test_cards_without_a_solution_say_so(session):
    said = "No formula of these cards makes the target"
    assert [said in each for each in rounds(session("tiny", "deal A A A 2", "index 0"))] == [False, True, False]


def test_a_wrong_answer_by_the_old_rule_is_named(session, monkeypatch):
    """A model that answers every prompt as if J = Q = K = 10."""
    hand = tasks.make("gp-l", "10", split="test", index=0, style="short")

    def stubborn(model, tokenizer, problems, group, sampling):
        episode = play_rollout(model, tokenizer, problems, group, sampling)[0][0]
        (turn,) = episode.turns
        step = problems[0].step(hand.expert())
        episode.turns = [turn | {"response": hand.expert(), "outcome": step.outcome, "feedback": step.feedback}]
        return [[episode]]
    play_rollout = play.rollout
    monkeypatch.setattr(play, "rollout", stubborn)
    old, new = rounds(session("tiny", "rule 11,12,13"))
    note = "but right by rule 10, which is not the prompt's"
    assert "RIGHT" in old and note not in old
    assert "WRONG" in new and note in " ".join(new.split()) and "tiny 0 of 1" in new


def test_two_models_answer_the_same_problem_side_by_side(session, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text, = rounds(session(f"tiny --play {ROOT / 'assets' / 'tiny-gp-l'} --attempts 2"))
    assert re.search(r"^tiny {2,}\S*tiny-gp-l$", text, re.MULTILINE)
    assert text.count("A 9 J 5, JQK=10,10,10, make 24") == 1 and re.search(r"tiny \d of 1, tiny-gp-l \d of 1$", text)
    answers = text.splitlines()[3:-2]
    assert all(len(line) <= 100 for line in answers)
    assert any(re.match(r".*(RIGHT|WRONG).{5,}(RIGHT|WRONG)", line) for line in answers)


def test_models_only_behind_play(session):
    assert re.search(r"tiny 1 of 1, tiny 1 of 1$", rounds(session("--play tiny tiny"))[0])


BAD = ["rule x", "rule 1,2", "rule", "rule 100000", "rule 10/target=999/cards=3", "look red", "index -1", "index x", "index 1.5",
       "temperature nan", "temperature -1", "attempts 0", "attempts 1e9", "deal", "deal K 7", "deal K K K K K", "deal K 7 2 X", "J=x", "J=",
       "J", "dance", "\x1b[31mred", "index " + "9" * 5000]


def test_a_bad_command_is_one_sentence_and_changes_nothing(session):
    printed = session("tiny", *BAD, "again")
    first, again = rounds(printed)
    assert first == again and "Traceback" not in printed and "\x1b" not in printed
    _, *replies, last, end = re.split("^> ", printed, flags=re.MULTILINE)
    assert len(replies) == len(BAD) and "---" in last
    for line, reply in zip(BAD, replies):
        said = reply.split("\n", 1)[1].strip()  # behind the line itself
        assert said and "\n" not in said and len(said) < 200, (line, said)


def test_the_verifiers_words_come_between_attempts(session):
    two = rounds(session("tiny --attempts 3", "index 1"))[1]
    problem = tasks.make("gp-l", split="test", index=1, attempts=3, style="short")
    steps = [problem.step(" ".join(answer.split())) for answer in re.findall(r"\{.*?\}", two, re.DOTALL)]
    assert [step.outcome for step in steps] == ["wrong_value", "correct"]  # the second attempt follows the first
    assert steps[0].feedback in two.split("RIGHT")[0] and "tiny 0 of 2" not in two and "of 2" in two


def test_attempts_and_temperature(session):
    torch.manual_seed(0)
    one, three, *warm = rounds(session("tiny", "attempts 3", "temperature 2", "again", "again", "again", "again"))
    assert len(re.findall("RIGHT|WRONG", one)) == 1
    assert all(1 <= len(re.findall("RIGHT|WRONG", each)) <= 3 for each in (three, *warm))
    assert len({each.split("make 24")[1] for each in warm}) > 1  # drawn anew each time


def test_no_call_for_another_answer_after_the_last(session, monkeypatch):
    monkeypatch.setattr(play, "prompt_style", lambda model, tokenizer: {"style": "full", "tile": 32})
    text = " ".join(session("tiny --attempts 2").split())  # it cannot read these words
    assert text.count("WRONG") == 2 and text.count("another answer in the same JSON form") == 1


def test_help_expert_random_and_both_ends(session):
    printed = session("tiny", "help", "expert", "random", "quit", "index 3")
    assert play.HELP in printed and len(rounds(printed)) == 2 and "test 3 |" not in printed
    assert tasks.make("gp-l", split="test", index=0, style="short").expert() in printed
    assert session("tiny").endswith("\n> \n")  # the end of the input
    for word in ("deal", "rule", "look", "index", "random", "again", "expert", "temperature", "attempts", "next", "quit"):
        assert re.search(rf"\b{word}\b", play.HELP)


def test_cards_in_pictures(session):
    printed = session("tiny --suite gp-vl", "look red/style=dark", "deal K 7 4 A", "deal K K K 2", "look red/style=pink", "look text")
    first, red, typed, text = rounds(printed)
    assert "look black" in first and "look red/style=dark" in red and "K 7 4 A" in typed and "K 7 4 A, JQK" in text
    paths = [re.search(r"^picture: (\S+)$", each, re.MULTILINE) for each in (first, red, typed)]
    images = [Image.open(path[1]).convert("RGB") for path in paths]
    assert all(image.width >= 512 for image in images) and len({image.tobytes() for image in images}) == 3
    for path, image in zip(paths, images):  # each shows what the model saw, larger
        image.close()
        Path(path[1]).unlink()
    assert "picture:" not in text and printed.count("is no hand of") == 1 and "style must be one of" in printed


def test_walks(session):
    printed = session("tiny --suite virl-l --attempts 2", "rule relative", "deal K 7 2 A", "look dusk", "rule 10", "index 3")
    first, sides, third = rounds(printed)
    assert "compass" in first and "sides" in sides and "test 3" in third and "position 2: " in first
    assert first.split("test 0")[1].split(".")[1] == sides.split("test 0")[1].split(".")[1]  # the same route
    assert "no command of virl-l" in printed and "is a task in text" in printed and "is no rule for turns" in printed
    for path in re.findall(r"^map: (\S+)$", printed, re.MULTILINE):
        assert Image.open(path).size[0] > 300
        Path(path).unlink()


def test_street_views_come_as_files(session):
    text, = rounds(session("tiny --suite virl-vl"))
    paths = re.findall(r"^(?:map|picture): (\S+)$", text, re.MULTILINE)
    assert len(paths) > 1
    for path in paths:
        Path(path).unlink()


def test_a_run_brings_its_rule_and_attempts(session, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text('{"task": "gp-l", "rule": "7,8,9", "attempts": 9, "steps": 1}')
    (run / "latest").write_text("step-000001\n")
    (run / "step-000001").symlink_to(ROOT / "assets" / "tiny-gp-l")
    text, = rounds(session(str(run)))
    assert "rule 7,8,9" in text and "JQK=7,8,9" in text
    assert any(1 < len(re.findall("RIGHT|WRONG", each)) <= 9 for each in rounds(session(str(run), "next", "next", "next")))


def test_evaluate_starts_it_and_hands_its_status_on():
    def start(argv, typed=""):
        return subprocess.run([sys.executable, ROOT / "evaluate.py", *argv.split()], input=typed, capture_output=True, text=True,
                              timeout=300)
    played = start("tiny --play", "rule 11,12,13\n")
    assert played.returncode == 0 and len(rounds(played.stdout)) == 2
    assert "JQK=11,12,13" in played.stdout and not played.stderr
    wrong = start("no-such-run --play")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_text_of_a_model_cannot_steer_the_terminal(capsys):
    play.say_side_by_side([["a", "\x1b[2J\u202eevil\n\tok"], ["b"]])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed and "[2Jevil" in printed
