"""Play with models: deal a hand or a walk, change the rule or the look, and see who follows.

    python evaluate.py runs/demo/sft-s0 --play runs/demo/rl-s0      # two models side by side
    python -m assets.play runs/demo/sft-s0 --play runs/demo/rl-s0   # the same
    python evaluate.py tiny --suite gp-vl --play                    # one model, cards in pictures
"""
import random
import re
import shutil
import sys
import tempfile
import textwrap
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks  # noqa: E402
from assets.game import AGAIN  # noqa: E402
from evaluate import clean, load, parse_args, prompt_style, rollout, run_flags, run_main  # noqa: E402
from model import Sampling  # noqa: E402

HELP = """next                    deal the next problem (an empty line does so too)
index 7, random         deal this one, or any one
deal K 7 2 A            deal these cards (`deal` may be left out)
rule 11,12,13           change the rule, the cards stay (J=11: of one card; walks: absolute or relative)
look red/style=dark     change the look of the pictures
temperature 1           0: the likeliest answer; 1: drawn as in training, a new one each time
attempts 3              answers that a model may give to a question
again, expert, quit     ask once more; show a right answer; end the game"""
NUMBERS = {"index": (int, 0, 10**9), "temperature": (float, 0, 10), "attempts": (int, 1, 100)}


@dataclass
class Player:
    """A model that answers. rule: of its training, for a shipped base the task's."""
    name: str
    model: object
    tokenizer: object
    max_new_tokens: int
    rule: str
    first: dict = field(default_factory=dict)  # {(rule, look): {problem: whether the first attempt was right}}


@dataclass(frozen=True)
class Table:
    """What is played: arguments of tasks.make, and the cards ((rank, suit), ...) where they are not to be dealt."""
    task: str
    split: str
    rule: str
    visual: str | None
    attempts: int
    temperature: float = 0.0
    index: int = 0
    hand: tuple = ()

    def problem(self, player, judged_by=None):
        """The problem as it is put to a player. ValueError for a rule, a look or cards that do not fit."""
        fixed = {"visual": self.visual, "split": self.split, "index": self.index, "attempts": self.attempts}
        fixed |= prompt_style(player.model, player.tokenizer)
        if not self.hand:
            return tasks.make(self.task, self.rule, judged_by=judged_by, **fixed)
        rule = tasks.parse_rule(self.rule, random.Random(self.index))
        rule = replace(rule, target=rule.target or 24)
        judge = replace(rule, faces=tasks.parse_rule(judged_by or rule).faces)
        dealt = tasks.make(self.task, f"10/cards={len(self.hand)}", **fixed)  # only its look is taken
        return replace(dealt, hand=self.hand, rule=rule, judged_by=judge)


def read_number(text, kind, low, high):
    """A number that was typed. ValueError for other texts."""
    with suppress(ValueError):
        if low <= (value := kind(text)) <= high:  # NaN is in no range
            return value
    raise ValueError(f"{text[:20]!r} is no {'whole ' * (kind is int)}number from {low} to {high}.")


def read_hand(text, most):
    """Cards (rank, suit) from their names, no rank more than `most` times. ValueError for other texts."""
    hand, ranks = [], [tasks.RANK_OF.get(word, 0) for word in text.upper().replace(",", " ").split()]
    if not 3 <= len(ranks) <= 6 or 0 in ranks or max(map(ranks.count, ranks)) > most:
        raise ValueError(f"{text[:40]!r} is no hand of 3 to 6 cards such as K 7 2 A, each at most {most} times.")
    for i, rank in enumerate(ranks):
        hand.append((rank, next(suit for suit in "SDHCSDHC"[i % 4:] if (rank, suit) not in hand)))
    return tuple(hand)


def say(text):
    """Print a text of unknown origin."""
    print(clean(text), flush=True)


def say_side_by_side(columns):
    """Print columns, each a list of texts; those of one row begin in the same line."""
    width = max(20, (min(shutil.get_terminal_size((100, 24)).columns, 120) + 1) // len(columns) - 3)
    say("")
    for row in zip_longest(*columns, fillvalue=""):
        cells = [[part for line in clean(text).expandtabs().splitlines()
                  for part in textwrap.wrap(line, width, replace_whitespace=False) or [""]] for text in row]
        for parts in zip_longest(*cells, fillvalue=""):
            say("   ".join(part.ljust(width) for part in parts).rstrip())
        say("")


def save_figures(episode):
    """Write an episode's pictures, and the map of a walk, as files, and print their paths."""
    for name, figures in episode.problem.figures(episode.turns).items():
        for figure in figures if isinstance(figures, list) else [figures]:
            larger = max(1, 512 // figure.width)  # a tiny model's cards have 32 pixels
            with tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".png", delete=False) as file:
                figure.convert("RGB").resize((figure.width * larger, figure.height * larger), 0).save(file)
            say(f"{name.removesuffix('s')}: {file.name}")


def judged(table, player, problem, turns):
    """The turns of an episode as texts: the answer, a mark and the verifier's words. Where a wrong answer is right by
    the rule of the model's training, the model did not follow the prompt."""
    texts = []
    for turn in turns:
        right = turn["outcome"] in tasks.RIGHT
        said = turn["feedback"] if turn is not turns[-1] else turn["feedback"].replace(AGAIN, "")
        place = f"position {turn['position'] + 1}: " if problem.leads_on else ""
        mark = "\u2713 RIGHT" if right else f"\u2717 WRONG, {turn['outcome'].replace('_', ' ')}"
        texts.append(f"{place}{turn['response']}\n{mark}: {said}")
        with suppress(ValueError):  # its rule may hold a wildcard
            other = table.problem(player, judged_by=player.rule)
            other.position = turn.get("position", 0)
            if not right and other.step(turn["response"]).outcome in tasks.RIGHT:
                texts[-1] += f"\nbut right by rule {player.rule}, which is not the prompt's"
    return texts


def play(table, players):
    """A round: show the problem, and the answers of all players with the verifier's words in between, as in training."""
    problems = [table.problem(player) for player in players]
    hand, look = (getattr(problems[0], name, None) for name in ("hand", "look"))
    facts = [table.task, "these cards" if table.hand else f"{table.split} {table.index}", f"rule {table.rule}",
             look and f"look {look}", hand and " ".join(tasks.rank_names(hand))]
    say(f"\n--- {' | '.join(filter(None, facts))}\n{problems[0].prompt}")
    if hand and not problems[0].solution(problems[0].rule):
        say("No formula of these cards makes the target; `next` deals others.")
    columns, scores, episodes = [], [], []
    for player, problem in zip(players, problems):
        sampling = Sampling(player.max_new_tokens, table.temperature)
        episodes += rollout(player.model, player.tokenizer, [problem], 1, sampling)[0]
        first = player.first.setdefault((table.rule, table.visual), {})
        first[table.index, table.hand] = episodes[-1].solved(1)
        scores.append(f"{Path(player.name).name} {sum(first.values())} of {len(first)}")
        asked = [f"was asked: {problem.prompt}"] * (problem.prompt != problems[0].prompt)
        columns.append([player.name, *asked, *judged(table, player, problem, episodes[-1].turns)])
    save_figures(max(episodes, key=lambda episode: episode.problem.position))
    say_side_by_side(columns)
    say(f"rule {table.rule}, first attempts right so far: {', '.join(scores)}")


def changed(table, problem, word, text):
    """The table after a command; problem: the one that lies there. ValueError for a command that does not fit."""
    cards = isinstance(problem, tasks.GeneralPoints)
    if cards and re.fullmatch("[jqk]=.*", word):  # the value of one card
        faces = dict(zip("jqk", problem.rule.faces)) | {word[0]: word[2:]}
        target = problem.rule.target
        word, text = "rule", ",".join(map(str, faces.values())) + f"/target={target}" * (target != 24)
    if word in ("next", "random"):
        word, text = "index", str(table.index + 1 if word == "next" else random.randrange(10**6))
    if word in NUMBERS:
        table = replace(table, hand=() if word == "index" else table.hand, **{word: read_number(text, *NUMBERS[word])})
    if word == "deal" and cards:
        return replace(table, hand=read_hand(text, 2 if tasks.TASKS[table.task].pictures else 4))
    if word == "rule":  # the cards stay, unless it says how many there are or leaves something to chance
        return replace(table, rule=text, hand=problem.hand if cards and not re.search("[*?]|cards|courts", text) else ())
    if word not in ("again", "look", *NUMBERS):
        raise ValueError(f"{word[:20]!r} is no command of {table.task}; `help` lists them.")
    return replace(table, visual=text) if word == "look" else table


def run(table, players):
    """Read commands until `quit` or the end of the input. What cannot be done is told in one sentence."""
    line = f"index {table.index}"
    while line not in ("quit", "exit", "q"):
        word, _, text = line.partition(" ")
        word, text = ("deal", line) if word.upper() in tasks.RANK_OF else (word.lower() or "next", text.strip())
        try:
            problem = table.problem(players[0])
            if word == "help":
                say(HELP)
            elif word == "expert":
                say("\n".join(problem.demonstrate("expert", random.Random(0))[::2]))
            else:
                play(new := changed(table, problem, word, text), players)
                table = new
        except (ValueError, OSError) as error:
            say(" ".join(str(error).split()))
        try:
            line = input("\n> ").strip()
        except EOFError:
            return print()
        if not sys.stdin.isatty():
            say(line)


def main(argv=None):
    """Load the models and play."""
    args, players = parse_args(argv), []
    task = args.suite.removesuffix("-probes")
    row = tasks.TASKS[task]
    for name in filter(None, (args.model, *(args.play or ()))):
        model, tokenizer, settings = load(name, args)
        flags = run_flags(name)
        rule = flags.get("rule", row.rule) if flags.get("task") == task else row.rule
        players.append(Player(name, model, tokenizer, settings.max_new_tokens, rule))
    say(f"{task}: {' and '.join(player.name for player in players)}; `help` lists the commands.")
    run(Table(task, args.split, args.rule or row.rule, args.visual or row.visual, args.attempts), players)


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout):  # not every terminal can show or send every character
        stream.reconfigure(errors="replace")
    run_main(main)
