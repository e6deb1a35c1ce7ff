"""A game with the tasks: problems as models see them, and answers judged. `python tasks.py` starts it.

    python tasks.py --task gp-l --rule 11,12,13
"""
import argparse
import json
import random
import signal
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets.panoramas import make as make_released  # noqa: E402
from tasks import SPLITS, TARGETS, TASKS, GeneralPoints, Look, Scene, Step, any_of, make, printable, solutions  # noqa: E402

AGAIN = " Please give another answer in the same JSON form."  # not said where none can follow


def parse_args(argv=None):
    """Command line that shows problems."""
    cards, streets = ("; ".join(f"{name} {any_of(known)}" for name, known in each.options().items())
                      for each in (Look, Scene))
    parser = argparse.ArgumentParser(description="Show problems as models see them; judge answers.")
    which = parser.add_argument_group("which problems").add_argument
    which("--task", default="gp-l", help=f"one of: {', '.join(TASKS)} (default %(default)s)")
    which("--rule", help="GeneralPoints: the values of J, Q, K: 10 or 11,12,13, * or ? for any of "
          f"1..13 or 10..13; then /target=N or * (any of {TARGETS[0]}..{TARGETS[1]}) /cards=N "
          "/courts=N (at least N face cards). Not named: 24 and 4 cards (default 10). V-IRL: "
          "absolute or relative (default absolute)")
    which("--split", default="test", help=f"one of: {', '.join(SPLITS)} (default %(default)s)")
    which("--index", type=int, default=0, help="the first problem's index (default 0)")
    which("--n", type=int, default=3, help="number of problems (default 3)")
    which("--seed", type=int, default=0, help="shifts the training problems (default 0)")
    which("--style", default="full", help="full: the prompts of an instruct model; short: those of "
          "the tiny model (default full)")
    which("--data", metavar="FOLDER", help="V-IRL: take released routes from this folder")
    pictures = parser.add_argument_group("pictures").add_argument
    pictures("--visual", metavar="LOOK", help="such as red/layout=grid or dusk/weather=rain; * for "
             f"any value, a|b for one of some. Cards (default black): {cards}. Streets (default "
             f"day): {streets}")
    pictures("--tile", type=int, default=560, help="pixels of the model's tiles (default 560)")
    answers = parser.add_argument_group("answers").add_argument
    answers("--answer", metavar="TEXT", help="judge this answer to the first problem: a response "
            "(JSON), or a formula or action alone")
    answers("--ask", action="store_true", help="ask for answers, as is done at a terminal anyway")
    answers("--attempts", type=int, default=1, help="answers per question (default 1)")
    return parser.parse_args(argv)


def main(args) -> list[Step]:
    """Print the problems, ask for answers where asked to, and return the Steps that were judged."""
    if args.n < 1:
        raise ValueError("The number of problems must be 1 or more.")
    reader = "an instruct model" if args.style == "full" else "the tiny model"
    steps = []
    for index in range(args.index, args.index + args.n):
        asked = args.task, args.rule, args.visual, args.split, index
        settings = {name: vars(args)[name] for name in ("attempts", "style", "seed", "tile")}
        problem = (make_released(args.data, *asked, **settings) if args.data else
                   make(*asked, **settings))
        shown = [f" | {name} {getattr(problem, name)}" for name in ("rule", "cls", "look")
                 if getattr(problem, name, None)]
        _say(f"--- {args.task} | {args.split} {index} | for {reader}" + "".join(shown))
        _say(problem.prompt + "\n")
        _show_picture(problem)
        for line in _answers(problem, args, index == args.index):
            bare = problem.asks and "{" not in line  # a formula or an action alone
            step = problem.step(json.dumps({problem.asks: line}) if bare else line)
            said = step.feedback.replace(AGAIN, "") if step.done else step.feedback
            _say(f"Verdict: {step.outcome}, reward {step.reward:+g}. {said}\n")
            steps.append(step)
            if step.outcome == "right_action":
                _show_picture(problem)
        _say("Expert: " + "\n        ".join(problem.demonstrate("expert", random.Random(0))))
        if isinstance(problem, GeneralPoints) and len(problem.hand) <= 4:
            _say(f"Distinct solutions: {len(solutions(problem.numbers, problem.rule.target))}")
        _say("")
    return steps


def _answers(problem, args, first):
    """Yield --answer for the first problem, or else what a person types until all is answered."""
    if args.answer is not None:
        yield from [args.answer] * first
    elif args.ask or sys.stdin.isatty():
        with suppress(EOFError):
            while not problem.done:
                yield input(f"Your {problem.asks}, or a whole response: ")


def _show_picture(problem):
    """Write the picture of the open question, where there is one, and say where."""
    if problem.image:
        with NamedTemporaryFile(suffix=".png", delete=False) as file:
            problem.image.save(file)
        _say(f"Picture: {file.name}\n")


def _say(text):
    """Print a text of unknown origin."""
    print("\n".join(printable(line, len(line)) for line in text.split("\n")))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends this without a traceback
    sys.stdout.reconfigure(errors="replace")  # a terminal may not be able to show every character
    try:
        main(parse_args())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
