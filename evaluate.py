"""Rollouts, the ID/OOD suites, intervals, tables, plots and the report.

Contents
  1. Episodes and rollout   problem -> prompt -> response -> verifier -> ... as one growing list of token ids
  2. Evaluation             the same held-out problems under every rule, greedy and at temperature 1
  3. Runs and models        what a name on the command line means, and text that is safe to show
  4. Intervals              bootstrap over classes, paired differences, pass@k
  5. A study                the evaluations of all arms and seeds
  6. Tables                 what the terminal and the README show
  7. Figures                SVG, written here
  8. Report                 one HTML page that loads nothing and runs nothing
  9. Command line           `python evaluate.py runs/demo/rl --suite gp-l`, `python evaluate.py --report runs/demo`

Shapes: P problems, G episodes of one problem (a group), B = P * G rows.
"""

import argparse
import base64
import copy
import functools
import html
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import tasks
from model import (Cache, ImageContext, generate, joined, load_model, open_image, pack_images, pad_rows, save_model, write_atomically,
                   write_json)

# ---------------------------------------------------------------- 1. Episodes and rollout


@dataclass
class Episode:
    """One problem answered by the policy: token ids that only ever grow, and what they are.

    ids            everything the model reads: prompt, responses, verifier text
    response_mask  1 where the policy sampled the token, its stop token included; 0 elsewhere
    log_probs      log-probability under the policy that sampled it; 0.0 where the mask is 0
    turns          one dict per answer: response, outcome, reward, feedback, read and, on a walk, its position
    pictures       those that it was shown, one for each <|image|> among the ids
    seen           of the pictures that a rollout has encoded: (ImageContext, set)
    """

    problem: object
    ids: list = field(default_factory=list)
    response_mask: list = field(default_factory=list)
    log_probs: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    seen: list = field(default_factory=list)

    def open(self, tokenizer):
        """Begin with the problem's prompt and picture, if it has one. -> self"""
        self.pictures = [self.problem.image] if self.problem.image is not None else []
        self.read(tokenizer.prompt(self.problem.prompt, image=bool(self.pictures)))
        return self

    def twin(self):
        """A copy that goes on by itself: another episode of the group. The pictures are the same objects."""
        return Episode(copy.copy(self.problem), *([*kept] for kept in list(vars(self).values())[1:]))

    def read(self, ids):
        """Append tokens that the policy did not choose."""
        self.ids += ids
        self.response_mask += [0] * len(ids)
        self.log_probs += [0.0] * len(ids)

    def respond(self, ids, log_probs=None):
        """Append a response: tokens that the policy sampled (or a demonstrator wrote)."""
        self.ids += ids
        self.response_mask += [1] * len(ids)
        self.log_probs += log_probs if log_probs is not None else [0.0] * len(ids)

    def judge(self, tokenizer, text):
        """Let the verifier judge the response just appended; its words open the next turn. -> done"""
        step = self.note(self.problem, text)
        if not step.done:
            if self.ids[-1] not in tokenizer.stop_ids:  # cut off at max_new_tokens: close the message, unsampled
                self.read([tokenizer.eot])
            self.hear(tokenizer, step)
        return step.done

    def note(self, problem, text):
        """Let a problem judge a response, and write down what it says. -> Step"""
        position, step = getattr(problem, "position", None), problem.step(text)
        self.turns.append({"response": text, "outcome": step.outcome, "reward": step.reward, "feedback": step.feedback,
                           "read": step.read} | ({} if position is None else {"position": position}))
        return step

    def hear(self, tokenizer, step):
        """The verifier's words; where a right action has led on, behind the picture of the new position."""
        moved = step.outcome == "right_action" and self.problem.image is not None
        self.pictures += [self.problem.image] if moved else []
        self.read(tokenizer.turn(step.feedback, image=moved))

    def teach(self, tokenizer, text):
        """Judge the response just appended, then put the expert's in its place, which leads on (teacher forcing). -> done"""
        self.note(copy.copy(self.problem), text)
        end = len(self.ids) - len(_last_response(self))
        for kept in (self.ids, self.response_mask, self.log_probs):
            del kept[end:]
        expert, step = self.problem.advance()
        self.read([*tokenizer.encode(expert), tokenizer.eot])
        if not step.done:
            self.hear(tokenizer, step)
        return step.done

    def total(self, discount=1.0):
        """The episode's return: the discounted sum of its rewards."""
        return sum(discount**t * turn["reward"] for t, turn in enumerate(self.turns))

    def solved(self, attempts=None):
        """Whether one of the first `attempts` answers (default: any) was right; on a walk, the steps that were right do not count
        as attempts, and only the last one solves it."""
        return solved([turn["outcome"] for turn in self.turns], attempts)


def solved(outcomes, attempts=None):
    """Episode.solved, from the outcomes of the answers in their order."""
    return "correct" in [outcome for outcome in outcomes if outcome != "right_action"][:attempts]


@torch.no_grad()
def rollout(model, tokenizer, problems, group=1, max_new_tokens=64, temperature=1.0, generator=None, rows=256, forced=False):
    """Play `group` episodes of every problem with the verifier in the loop.

    problems: fresh task instances (each is copied, so they stay unused). rows: episodes computed side by side, at least
    one group. The prompt is computed once for its whole group, the KV cache lives through all turns, and finished episodes leave
    the batch between turns. A picture is encoded once, for all episodes that come to it, all their turns and the training pass.
    forced, for walks: every position is judged with the right history, whatever was answered before (teacher forcing).
    Returns a list of P lists of G Episodes.

    Memory of an episode while it is played: keys and values of its tokens, those of one picture (the one it stands before; two
    while a new turn is read), and the features of the pictures it came to, which the training pass uses again.
    """
    groups, size = [], max(1, rows // group)
    for first in range(0, len(problems), size):
        with joined(model):
            groups += _rollout_batch(model, tokenizer, problems[first : first + size], group, max_new_tokens, temperature,
                                     generator, forced)
    return groups


def encode(model, pictures):
    """Pictures as the decoder sees them: [(ImageContext, set)] in their order; one that comes twice is encoded once."""
    different = {id(picture): [picture] for picture in pictures}
    context = model.see(*pack_images([*different.values()], model.config.vision.image_size)) if different else None
    place = {key: i for i, key in enumerate(different)}
    return [(context, place[id(picture)]) for picture in pictures]


def look(model, episodes, known):
    """What is new to see for episodes of a rollout: an ImageContext with the pictures that they were shown since the last call,
    None without any. known: {id of a picture: (ImageContext, set)}, grows by those that are encoded here. ValueError for a second
    picture where tokens before the first one would look at it too, and so at what is not there yet."""
    fresh = [e.pictures[len(e.seen) :] for e in episodes]
    if not model.config.mask_prefix_attention and any(e.seen and pictures for e, pictures in zip(episodes, fresh)):
        raise ValueError("a model whose first tokens look at all pictures cannot be shown one after the other: set "
                         "mask_prefix_attention to true in its config.json, as Meta's code has it.")
    new = {id(picture): picture for pictures in fresh for picture in pictures if id(picture) not in known}
    known.update(zip(new, encode(model, new.values())))
    for e, pictures in zip(episodes, fresh):
        e.seen += [known[id(picture)] for picture in pictures]
    return together([[known[id(picture)] for picture in pictures] for pictures in fresh])


def together(rows):
    """One ImageContext for rows of text that see several pictures each: lists of (ImageContext, set) in the order of their
    <|image|> tokens. Rows with equal lists share them; None where all are empty."""
    keys = [tuple((id(context), i) for context, i in row) for row in rows]
    sets = dict(zip(keys, rows))
    if not any(sets):
        return None
    known = next(context for row in rows for context, _ in row)
    blank, count = (torch.zeros_like(known.features[0]), torch.zeros_like(known.tiles[0])), max(map(len, keys))
    padded = [[(context.features[i], context.tiles[i]) for context, i in row] + [blank] * (count - len(row))
              for row in sets.values()]
    features, tiles = (torch.stack([torch.cat([picture[part] for picture in row]) for row in padded]) for part in (0, 1))
    place = {key: i for i, key in enumerate(sets)}
    return ImageContext(features, tiles, torch.tensor([place[key] for key in keys], device=tiles.device), known.prefix_looks)


def seen_by(model, episodes):
    """The ImageContext for a batch of episodes, in their order; None for text. While tower or projector are trained their
    pictures are encoded here, with gradient; else what the rollout has encoded is used again.

    What one episode of a group has seen continues what the others have, so the longest list serves them all. A token attends to
    one picture only, but by a mask over all of its set: a training pass holds B x T x I pictures' tokens of mask."""
    longest = {}
    for e in episodes:
        longest[beginning(e)] = max(longest.get(beginning(e), e), e, key=lambda e: len(e.pictures))
    seen = {key: e.seen for key, e in longest.items()}
    if model.learns_to_see or not all(e.seen or not e.pictures for e in episodes):
        with torch.set_grad_enabled(model.learns_to_see and torch.is_grad_enabled()):
            shown = iter(encode(model, [picture for e in longest.values() for picture in e.pictures]))
        seen = {key: [next(shown) for _ in e.pictures] for key, e in longest.items()}
    return together([seen[beginning(e)] for e in episodes])


def beginning(episode):
    """What the episodes of a group have in common: the ids of the prompt and its picture."""
    return tuple(episode.ids[: episode.response_mask.index(1)]), *map(id, episode.pictures[:1])


def _rollout_batch(model, tokenizer, problems, group, max_new_tokens, temperature, generator, forced):
    opened, known = [Episode(copy.copy(p)).open(tokenizer) for p in problems], {}
    ids, lengths = pad_rows([e.ids for e in opened], tokenizer.pad, model.device)
    cache = Cache(model, len(problems), ids.shape[1] + max_new_tokens, look(model, opened, known))
    logits = model.extend(cache, ids, lengths)
    rows = torch.arange(len(problems), device=model.device).repeat_interleave(group)
    cache.select(rows)
    groups = [[e.twin() for _ in range(group)] for e in opened]
    active, logits = [e for members in groups for e in members], logits[rows]
    while True:
        before = cache.length
        responses = generate(model, cache, logits, max_new_tokens, tokenizer.stop_ids, temperature, generator)
        for episode, response, log_probs in zip(active, *responses):
            episode.respond(response, log_probs)
        if forced:  # the slots of the responses are written over
            cache.length = before
        judge = Episode.teach if forced else Episode.judge
        going = [i for i, e in enumerate(active) if not judge(e, tokenizer, tokenizer.decode(_last_response(e)))]
        if not going:
            return groups
        active = [active[i] for i in going]
        cache.select(torch.tensor(going, device=model.device))
        new = [e.ids[seen:] for e, seen in zip(active, cache.length.tolist())]  # the last sampled token comes first
        ids, lengths = pad_rows(new, tokenizer.pad, model.device)
        more = look(model, active, known)
        cache.show(more)
        logits = model.extend(cache.reserve(ids.shape[1] + max_new_tokens), ids, lengths)
        if more is not None:
            cache.forget()


def _last_response(episode):
    """Ids of the response at the end of the episode."""
    start = len(episode.ids)
    while start and episode.response_mask[start - 1]:
        start -= 1
    return episode.ids[start:]


def answer_length(tokenizer):
    """Tokens that an answer may have by default: the tiny model's prompts and answers are short."""
    return 64 if tokenizer.short else 256


def truncated(episodes, tokenizer):
    """Share of episodes whose last answer was cut off before its stop token."""
    return sum(e.ids[-1] not in tokenizer.stop_ids for e in episodes) / len(episodes)


def to_batch(episodes, pad, device):
    """Episodes -> ids (B, T), chosen (B, T) bool, log_probs (B, T) float32, padded on the right."""
    ids, _ = pad_rows([e.ids for e in episodes], pad, device)
    chosen, _ = pad_rows([e.response_mask for e in episodes], 0, device)
    log_probs, _ = pad_rows([e.log_probs for e in episodes], 0.0, device)
    return ids, chosen.bool(), log_probs


def by_prompt(episodes):
    """Lists of the episodes that have the same prompt."""
    groups = {}
    for e in episodes:
        groups.setdefault(beginning(e), []).append(e)
    return list(groups.values())


def micro_batches(episodes, size):
    """Split episodes into lists of at most `size`; any size gives the same sum. Those of a prompt stay together where they
    fit, so that it is computed once, and similar lengths stand together, which makes little padding."""
    parts, length = [[]], lambda e: len(e.ids)
    for members in sorted(by_prompt(episodes), key=lambda group: max(map(length, group))):
        members = sorted(members, key=length)
        for piece in (members[i : i + size] for i in range(0, len(members), size)):
            if len(parts[-1]) + len(piece) > size:
                parts.append([])
            parts[-1] += piece
    return parts


# ---------------------------------------------------------------- 2. Evaluation


def evaluate(model, tokenizer, suite, n, attempts=1, split="test", max_new_tokens=64, rows=256, samples=4, only=None):
    """How a model does on the rows of a suite (or on those that `only` names), a number for every problem.

    Rows whose rules have the same target and number of cards deal the same n held-out hands. "greedy" is temperature 0,
    "sampled" temperature 1; "first" counts the first answer, "episode" any of the `attempts`, both 0 or 1; "read" is the share
    of the cards that the first answer names rightly. A row with a judge of its own ("fake rule") judges the answers of the row
    with the same prompt once more, by the other rule; the row "shuffled" gets the picture of another hand. A walk is right when
    it arrives, and has scores_per_step; its fake row is walked anew, since the verifier decides there what is seen next.
    """
    began, result, turns, classes, shown, cut, walk = time.time(), {}, {}, {}, [], [], tasks.walks(suite)
    suite_rows = [row for row in legible_rows(model, suite) if not only or row.name in only]
    for row in suite_rows:
        problems = suite_problems(model, tokenizer, suite, row, n, attempts, split)
        result[row.name], classes[row.name] = {}, [p.cls for p in problems]
        judged_again = row.judge is not None and not walk
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            if not judged_again:
                played = play(model, tokenizer, problems, 1, max_new_tokens, temperature, rows)
                played = [episode for group in played for episode in group]
                kept = list({e.solved(): e for e in reversed(played)}.values()) if walk else played  # of walks one of each end
                shown += [show_episode(row.name, e) for e in kept[: samples * (mode == "greedy")]]
                cut.append(truncated(played, tokenizer))
                turns[row.name, mode] = [e.turns for e in played]  # without the pictures
            asked = [r.name for r in suite_rows if judged_again and (r.rule, r.visual, r.judge) == (row.rule, row.visual, None)]
            answers = turns[asked[0] if judged_again else row.name, mode]
            outcomes = [[copy.copy(p).step(turn["response"]).outcome if judged_again else turn["outcome"] for turn in answer]
                        for p, answer in zip(problems, answers)]
            result[row.name][mode] = {"first": [int(solved(o, 1)) for o in outcomes],
                                      "episode": [int(solved(o)) for o in outcomes],
                                      "read": [round(answer[0]["read"], 4) for answer in answers]}
            if walk:
                forced = play(model, tokenizer, problems, 1, max_new_tokens, temperature, rows, forced=True)
                result[row.name][mode] |= scores_per_step(problems, answers, [episode.turns for (episode,) in forced])
    return {"suite": suite, "split": split, "n": n, "attempts": attempts, "classes": next(iter(classes.values())),
            "row_classes": classes, "truncated": max(cut), "rows": result, "samples": within(shown),
            "eval_seconds": round(time.time() - began, 2)}


def scores_per_step(problems, walked, forced):
    """Scores of walks by position, from the turns of each walk and of its teacher-forced twin: lists of n, for JSON.

    "steps_first", "steps": survival, the share of a route's positions passed before the first wrong answer, or before the
    attempts ran out (the paper's per-step accuracy: the mean of that share, so each route weighs the same, long or short).
    "forced": the share of positions answered rightly after a right walk up to each. Survival says how far one gets alone, and
    lets one kind of mistake cost all that would follow it; teacher-forced says what is known at each position. "failed_at": the
    position of the first wrong answer, or None. "read": the share of all answers that name what is there and nothing else.
    "marks", "forced_marks": a word a route, a letter a position reached: the right action's initial, capital if right at first.
    """
    walks = [tasks.walk_scores(len(p.actions), [turn["outcome"] for turn in turns]) for p, turns in zip(problems, walked)]
    marks, forced_marks = ([_marks(p, turns) for p, turns in zip(problems, of)] for of in (walked, forced))
    right = [sum(mark.isupper() for mark in word) / len(word) for word in forced_marks]
    return {"read": [round(sum(turn["read"] for turn in turns) / len(turns), 4) for turns in walked],
            "steps_first": [round(w["first"], 4) for w in walks], "steps": [round(w["episode"], 4) for w in walks],
            "forced": [round(share, 4) for share in right], "failed_at": [w["failed_at"] for w in walks],
            "marks": " ".join(marks), "forced_marks": " ".join(forced_marks)}


def _marks(problem, turns):
    first = {turn["position"]: turn["outcome"] in ("right_action", "correct") for turn in reversed(turns)}
    return "".join(problem.actions[i][0].upper() if right else problem.actions[i][0] for i, right in sorted(first.items()))


def play(model, tokenizer, problems, group, max_new_tokens, temperature, rows, **options):
    """`rollout` with its own random stream, and what was encoded of a few problems at a time in memory; so their pictures too,
    where they are large: a walk has a megabyte or more at every position."""
    generator, size, groups = torch.Generator(model.device).manual_seed(0), max(1, rows // group), []
    for first in range(0, len(problems), size):
        groups += rollout(model, tokenizer, problems[first : first + size], group, max_new_tokens, temperature, generator, rows,
                          **options)
        for e in (e for members in groups[first:] for e in members):
            e.seen = []
            if model.config.vision.image_size > 100:
                e.pictures = []
                getattr(e.problem, "drawn", {}).clear()
    return groups


def legible_rows(model, suite):
    """The rows of a suite but those whose pictures are too small for this model's tiles."""
    return [row for row in tasks.SUITES[suite] if row.legible(model.config.vision.image_size)]


def shown_to(model, tokenizer):
    """How problems are put to a model: short prompts for the tiny tokenizer, pictures of its own tiles' size."""
    return {"style": "short" if tokenizer.short else "full", "tile": model.config.vision.image_size}


def suite_problems(model, tokenizer, suite, row, n, attempts, split):
    """The n problems of one row of a suite, as they are put to this model."""
    problems = [tasks.make(suite.removesuffix("-probes"), row.rule, row.visual, split, i, attempts, judge=row.judge,
                           **shown_to(model, tokenizer)) for i in range(n)]
    if row.name == SHUFFLED:
        pictures = [p.image for p in problems]
        for p, picture in zip(problems, pictures[1:] + pictures[:1]):
            p.image = picture
    return problems


SHUFFLED = "shuffled"  # the control: a model that reads scores by chance here, one that guesses scores as always


def show_episode(row, episode):
    """An Episode as plain data for samples/ and the report: the picture as PNG in base64; of a walk its map and its views."""
    problem, shown = episode.problem, {}
    if isinstance(problem, tasks.Navigation):
        last = max((turn["position"] for turn in episode.turns), default=0)
        shown = {"pictures": [_png(problem.picture(i), 340) for i in range(last + 1)]} if problem.look else {}
        shown |= {} if problem.route.folder else {"map": _png(tasks.draw_map(problem, 340), 340)}  # released data has no map
    elif problem.image is not None:
        shown = {"picture": _png(problem.image)}
    return {"row": row, "prompt": problem.prompt, "turns": episode.turns, "reward": episode.total()} | shown


def _png(image, side=None):
    """In base64; with a `side`, of at most side x side pixels and 64 colours, not dithered: a few kilobytes."""
    if side:
        image = image.convert("RGB")
        image.thumbnail((side, side))
        image = image.quantize(64, dither=0)
    image.save(file := io.BytesIO(), "PNG", optimize=side is not None)
    return base64.b64encode(file.getvalue()).decode()


def within(samples, limit=10**6):
    """The samples, but the views of walks only where all pictures up to there have at most `limit` characters; maps stay."""
    size = sum(len(sample.get("map", "")) for sample in samples)
    for sample in samples:
        size += sum(map(len, sample.get("pictures", ())))
        if size > limit:
            sample.pop("pictures", None)
    return samples


def pass_at_1_to_k(model, tokenizer, suite, n, k, split="test", max_new_tokens=64, rows=256):
    """pass@1 .. pass@k at temperature 1 for every row of a suite: {row: [pass@1, ..., pass@k]}."""
    result = {}
    for row in legible_rows(model, suite):
        problems = suite_problems(model, tokenizer, suite, row, n, 1, split)
        groups = play(model, tokenizer, problems, k, max_new_tokens, 1.0, rows)
        right = [sum(e.solved() for e in g) for g in groups]
        result[row.name] = [float(np.mean([pass_at_k(k, c, j) for c in right])) for j in range(1, k + 1)]
    return result


def summary(result):
    """{row: {mode_score: share}} of an evaluation, for the metrics file."""
    return {f"{row}/{mode}/{score}": round(sum(hits) / len(hits), 4) for row, modes in result["rows"].items()
            for mode, scores in modes.items() for score, hits in scores.items() if score in (*PARTS, "read", *STEPS)}


# ---------------------------------------------------------------- 3. Runs and models


def find_model(name, task):
    """The model directory that a name means: `tiny` (the shipped base of the task), a run directory (its latest
    checkpoint), or a model directory itself. Raises ValueError with a sentence when there is none."""
    if name == "tiny":
        path = Path(__file__).parent / "assets" / f"tiny-{task}"
        if not path.is_dir():
            raise ValueError(f"no tiny base is shipped for {task} (looked for {path}).")
        return path
    path = Path(name)
    if (path / "latest").is_file():
        return latest_checkpoint(path)
    if not path.is_dir():
        raise ValueError(f"{name} is not a directory; give `tiny`, a run directory or a model directory.")
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"{name} holds neither a run with a checkpoint (file `latest`) nor a model (config.json).")
    return path


def latest_checkpoint(run):
    """The checkpoint directory that the run's pointer file names."""
    name = (Path(run) / "latest").read_bytes()[:100].decode("utf-8", "replace").strip()
    if not re.fullmatch(r"step-\d{6,9}", name) or not (Path(run) / name).is_dir():
        raise ValueError(f"{run}/latest does not name a checkpoint of this run; give one of its step-NNNNNN directories.")
    return Path(run) / name


def device_and_dtype(device):
    """("cuda", bfloat16) or ("cpu", float32); `auto` takes the GPU when there is one."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ValueError("--device must be auto, cpu or cuda (or cuda:1 and so on).")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and int(device[5:] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there is no such GPU; torch sees {torch.cuda.device_count()}.")
    return device, torch.bfloat16 if device.startswith("cuda") else torch.float32


UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]")


def clean(text):
    """Text without characters that steer a terminal, flip the reading direction or are not legal in XML."""
    return UNSAFE.sub("", str(text))


def esc(text):
    """`clean`, then escaped for HTML and XML, attributes included."""
    return html.escape(clean(text), quote=True)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in --help and whose errors are ValueErrors of one sentence."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags.")

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        for name, value in vars(args).items():
            if value == "" or isinstance(value, str) and UNSAFE.search(value):
                raise ValueError(f"--{name.replace('_', '-')} is empty or holds characters that no name or text has.")
        return args


LIMITS = {"steps": (1, 1e8), "batch": (1, 1e5), "problems": (1, 1e5), "group": (1, 1e4), "epochs": (1, 100), "micro_batch": (1, 1e6), "rows": (1, 1e6),
          "attempts": (1, 100), "max_new_tokens": (1, 1e5), "n": (1, 1e5), "eval_n": (1, 1e5), "k": (0, 1000), "evals": (0, 1e4),
          "save_every": (0, 1e8), "threads": (0, 1024), "seed": (0, 2**62), "lora_rank": (0, 4096), "lora_alpha": (1e-3, 1e5),
          "lr": (1e-12, 10), "lr_warmup": (0, 1e8), "lr_end": (0, 1), "weight_decay": (0, 10), "max_grad_norm": (1e-9, 1e9),
          "flops": (0, 1e30), "temperature": (0.05, 5), "discount": (0, 1), "clip_eps": (0, 10), "kl_coef": (0, 1e3),
          "kl_every": (0, 1e8)}


def check_limits(args):
    """ValueError for a number outside its range; NaN is outside of any."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {str(value)[:20]} must lie from {low:g} to {high:g}.")


def run_main(main):
    """Run a script's main: an expected error is one sentence on stderr and exit status 2, not a traceback."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        if isinstance(error, (MemoryError, RuntimeError)):
            error = "out of memory; lower --micro-batch, --rows or --max-new-tokens, or give --recompute. Checkpoints are as they were."
        if isinstance(error, OSError):
            error = f"{error.filename or 'a file'} could not be read or written: {error.strerror}. What was there is as it was."
        print(f"error: {' '.join(clean(error).split())}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- 4. Intervals
# A *row* is a way to score (id, rule, fake); a *view* is (decoding, part), such as ("greedy", "first"); S seeds, n problems,
# C classes (problems with the same numbers), P points of a curve. Success is a share in 0..1, printed in %.

ROWS = {"id": "ID", "rule": "rule OOD", "fake": "fake rule"}
MODES = {"greedy": "greedy", "sampled": "temperature 1"}
PARTS = {"first": "first attempt", "episode": "whole episode"}
STEPS = {"steps_first": "per step, until the first failure", "steps": "per step, until the attempts ran out",
         "forced": "per step, teacher-forced"}  # of walks, in words of `scores_per_step`
# What is said of a family of tasks, by the first word of the suite's name: what is counted, the trained rule, the other one, what
# makes a class, and the sentence about reading.
WORDS = ("things", "trained", "other", "alike", "read")
FAMILIES = {"gp": ("hands", "J = Q = K = 10", "J, Q, K = 11, 12, 13", "problems with the same numbers",
                   "All cards are read in {} of the hands"),
            "virl": ("routes", "absolute turns", "relative turns", "routes with the same turns in one city",
                     "What is seen is named rightly in {} of the answers"),
            None: ("problems", "the trained one", "another", "problems of the same kind", "All is read in {} of the problems")}


def words_for(suite):
    """{a name in WORDS: what it is for this suite}."""
    return dict(zip(WORDS, FAMILIES.get(re.split(r"\W", str(suite))[0], FAMILIES[None])))


@functools.lru_cache(maxsize=8)
def _draws(kinds, reps, seed):
    """How often each of `kinds` things comes up in each resample. The same for all arms. (reps, kinds)"""
    rng = np.random.default_rng([seed, kinds])
    return rng.multinomial(kinds, np.full(kinds, 1 / kinds), size=reps).astype(float)


def bootstrap(values, classes, reps=2000, seed=0, among=None):
    """Mean and 95 % percentile interval, by resampling whole classes with replacement: (mean, low, high).

    Problems of one class are nearly the same, so the class is the unit that is drawn (cluster bootstrap, Davison &
    Hinkley 1997, section 3.8). values: (n,), or (S, n) for the same problems under S seeds; seeds are then resampled
    too (hierarchical). classes: n names. With one class, or all values equal, the interval has no width: not certainty.
    among: weights of the same shape, such as 0/1 for those that are averaged over (default: all; NaN where there is none).
    """
    values = np.atleast_2d(np.asarray(values, float))                       # (S, n)
    if values.size == 0 or values.shape[1] != len(classes):
        raise ValueError(f"An interval needs problems, and a class for each: got {values.shape[1]} and {len(classes)}.")
    names, member = np.unique(np.asarray(classes, str), return_inverse=True)
    among = np.ones_like(values) if among is None else np.atleast_2d(np.asarray(among, float))
    if not among.any(1).all():
        return math.nan, math.nan, math.nan
    sums, counts = (np.stack([np.bincount(member, row, len(names)) for row in of]) for of in (values * among, among))  # (S, C)
    draws = _draws(len(names), reps, seed)                                  # (reps, C)
    means = draws @ sums.T / np.maximum(draws @ counts.T, 1e-9)             # (reps, S): classes differ in size
    means = (means * _draws(len(values), reps, seed + 1)).mean(1)           # the draws of a resample sum to S
    return float((sums.sum(1) / counts.sum(1)).mean()), *np.percentile(means, [2.5, 97.5]).tolist()


def paired(a, b, classes, reps=2000, seed=0):
    """Mean of a - b on the same problems and its interval, as `bootstrap`; (n,) or (S, n), seeds matched in order."""
    a, b = np.atleast_2d(np.asarray(a, float)), np.atleast_2d(np.asarray(b, float))
    if a.shape[1] != b.shape[1] or (len(a) != len(b) and 1 not in (len(a), len(b))):
        raise ValueError(f"A paired difference needs the same problems and seeds on both sides, not {a.shape} and {b.shape}.")
    return bootstrap(a - b, classes, reps, seed)


def pass_at_k(n, c, k):
    """Chance that k answers, drawn without replacement from n of which c are right, hold a right one: the unbiased
    estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1), which 1 - (1 - c/n)^k is not."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---------------------------------------------------------------- 5. A study

def _read(path, check):
    """check(the JSON in a file); any failure is one sentence that names the file."""
    try:
        return check(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(clean(f"{path} cannot be used ({why}): write it again with this version.")) from None


def _check_eval(e):
    """An evaluation, with "solved": {(row, decoding, part): n floats} made from its rows: 0 or 1, of "read" and STEPS shares."""
    e["step"], e["flops"], e["attempts"] = int(e["step"]), float(e["flops"]), int(e["attempts"])
    n, e["solved"], walk = len(e["classes"]), {}, tasks.walks(str(e.get("suite")))
    if n == 0 or not 0 <= e["flops"] < math.inf:
        raise ValueError("it has no problems, or its flops are not a count")
    for row, mode in ((row, mode) for row in (*ROWS, *e["rows"]) for mode in MODES):
        for part in (*PARTS, "read", *(STEPS if walk else ())):
            e["solved"][row, mode, part] = solved = np.asarray(e["rows"][row][mode][part], float)
            if solved.shape != (n,) or not ((0 <= solved) & (solved <= 1)).all() or part in PARTS and (solved % 1).any():
                raise ValueError(f"{row} {mode} {part} is not a list of {n} times " + ("0 or 1" if part in PARTS else "0 to 1"))
        if walk:
            marks, forced, failed_at = (e["rows"][row][mode][key] for key in ("marks", "forced_marks", "failed_at"))
            first = [next((i for i, mark in enumerate(word) if mark.islower()), None) for word in marks.split()]
            if first != failed_at or not len(first) == len(forced.split()) == n or re.search("[^tfsTFS ]", marks + forced):
                raise ValueError(f"{row} {mode} marks are not {n} words of letters t, f and s, or failed_at is not as they say")
    for sample in e["samples"]:
        sample["row"], sample["prompt"], sample["reward"], [turn["response"] for turn in sample["turns"]]
        for picture in (sample.get("picture", ""), sample.get("map", ""), *sample.get("pictures", ())):
            base64.b64decode(picture, validate=True)
        for turn in sample["turns"] if walk else ():
            turn["position"] = int(turn["position"])
    return e


def load_study(study_dir):
    """{arm: {seed: [evaluation, ...] by step}} of a study directory, from `RUN/evals/NNNNNN.json` and `RUN/args.json`.

    RUN is an arm's name with `-sN` for seed N, or without for seed 0. An evaluation is its file's content with "solved",
    {(row, decoding, part): (n,)}, and "args", the run's flags ({} for a base without). ValueError, one sentence, when there
    is nothing, a file is malformed, or two files did not score the same problems.
    """
    study, problems = {}, None
    for run in sorted({path.parent.parent for path in Path(study_dir).glob("*/evals/*.json")}):
        arm, seed = re.fullmatch(r"(.+?)(?:-s(\d{1,9}))?", run.name, re.DOTALL).groups()
        if int(seed or 0) in study.setdefault(arm, {}):
            raise ValueError(clean(f"{run} is a second run of arm {arm} with seed {seed or 0}: rename one of the two."))
        args = _read(run / "args.json", dict) if (run / "args.json").exists() else {}
        evals = [_read(path, _check_eval) | {"args": args} for path in (run / "evals").glob("*.json")]
        study[arm][int(seed or 0)] = sorted(evals, key=lambda e: e["step"])
        for e in evals:
            problems = problems or (e.get("suite"), e.get("split"), e["classes"])
            if problems != (e.get("suite"), e.get("split"), e["classes"]):
                things = words_for(e.get("suite"))["things"]
                raise ValueError(clean(f"{run}, step {e['step']}, scored other {things} than the runs before it: evaluate every "
                                       f"run on the same suite, split and number of {things}."))
    if not study:
        raise ValueError(clean(f"There is no evaluation in {study_dir}: train an arm first, or name a study directory."))
    order = {"base": 0, "warmup": 1, "sft": 2, "rl": 3}
    return dict(sorted(study.items(), key=lambda item: (order.get(item[0], 4), item[0])))


def any_eval(study):
    """One of its evaluations, for what is the same in all of them: suite, split, classes, attempts."""
    return next(iter(next(iter(study.values())).values()))[-1]


def any_args(study, arm):
    """The flags of one of an arm's runs, for what is the same in all of them."""
    return next(iter(study[arm].values()))[-1]["args"]


def arms_of(study):
    """The arms that are compared, SFT and RL first."""
    return [arm for arm in study if arm not in ("base", "warmup")]


def name_of(arm):
    """An arm's name on one line and without a bar: it goes into a markdown table."""
    return arm.upper() if arm in ("sft", "rl") else " ".join(clean(arm).replace("|", "/").split())


def view_name(view):
    """("greedy", "first") -> "greedy, first attempt"."""
    return f"{MODES[view[0]]}, {PARTS[view[1]]}"


def views(study):
    """What is reported: greedy and temperature 1; the whole episode too when there is more than one attempt."""
    return [(mode, part) for mode in MODES for part in PARTS if part == "first" or any_eval(study)["attempts"] > 1]


def best_checkpoint(evals, view, row="rule"):
    """The evaluation with the highest success in that row, the earliest of equals; the start counts as a checkpoint."""
    return max(evals, key=lambda e: (e["solved"][(row, *view)].mean(), -e["step"]))


def stages(study, view):
    """{"base", "start", "sft end", "sft best", "rl end", ...: (label, {seed: evaluation})}, those that there are.

    The start of a seed is the last evaluation of the warm-up, or else step 0 of SFT, or of RL.
    """
    last = {arm: {seed: evals[-1] for seed, evals in seeds.items()} for arm, seeds in study.items()}
    start = {}
    for arm in ("rl", "sft"):
        start |= {s: evals[0] for s, evals in study.get(arm, {}).items() if evals[0]["step"] == 0}
    start |= last.get("warmup", {})
    out = {"base": ("base", last.get("base")), "start": ("start", start)}
    for arm in arms_of(study):
        out[f"{arm} end"] = (f"{name_of(arm)}, end", last[arm])
        if arm == "sft":
            best = {s: best_checkpoint(evals, view) for s, evals in sorted(study[arm].items())}
            steps = ", ".join(str(e["step"]) for e in best.values())
            out["sft best"] = (f"SFT at its best OOD (step {steps})", best)
    return {key: stage for key, stage in out.items() if stage[1]}


def choose_rates(directory):
    """{arm: learning rate} of a grid of runs `ARM-lrRATE`, printed as a table and written to its file `chosen` for make: the
    smallest rate within one standard error of the best ID score (greedy, first attempt, last evaluation). OOD scores are
    shown nowhere: they must not choose."""
    study, grid = load_study(directory), {}
    for name, seeds in study.items():
        arm, found, rate = name.partition("-lr")
        if found:
            last = seeds[min(seeds)][-1]
            mean, low, high = bootstrap(last["solved"]["id", "greedy", "first"], last["classes"])
            grid.setdefault(arm, []).append((float(rate), mean, (high - low) / (2 * 1.96)))
    chosen = {}
    for arm, rates in grid.items():
        best = max(rates, key=lambda r: r[1])
        chosen[arm] = min(rate for rate, mean, _ in rates if mean >= best[1] - best[2])
        print(_markdown([f"{name_of(arm)}, learning rate", "ID on validation, %", "standard error", ""],
                        [[f"{rate:g}", f"{100 * mean:.1f}", f"{100 * error:.1f}", "chosen" if rate == chosen[arm] else ""]
                         for rate, mean, error in sorted(rates)]) + "\n")
    chosen_text = " ".join(f"{arm.upper()}_LR={rate:g}" for arm, rate in chosen.items())
    write_atomically(Path(directory) / "chosen", lambda p: p.write_text(chosen_text + "\n"))
    return chosen


# ---------------------------------------------------------------- 6. Tables

def has(evals, row, view):
    """Whether every one of {seed: evaluation} holds the row: on the way only those of ROWS are evaluated."""
    return all((row, *view) in e["solved"] for e in evals.values())


def _solved(evals, row, view, seeds=None):
    """Success of each problem under each seed, or the share that the view's part is. (S, n)"""
    return np.stack([evals[seed]["solved"][(row, *view)] for seed in (seeds or sorted(evals))])


STAGES = {"sft end": "SFT", "rl end": "RL", "start": "start", "sft best": "best SFT checkpoint"}
COMPARED = [("sft end", "start", "id"), ("rl end", "start", "id"), ("sft end", "start", "rule"), ("rl end", "start", "rule"),
            ("rl end", "sft end", "rule"), ("rl end", "sft best", "rule"), ("sft end", "start", "fake")]


def differences(study, view):
    """{(stage, other stage, row): (mean difference, low, high)}, paired by problem and by seed, for stages that there are."""
    out, stage = {}, stages(study, view)
    for a, b, row in COMPARED:
        left, right = (stage.get(key, ("", {}))[1] for key in (a, b))
        seeds = sorted(left.keys() & right.keys())            # each seed against its own start or opponent
        both = (sorted(left), list(right)) if b == "start" and len(right) == 1 else (seeds, seeds)    # one start serves all
        if all(both):
            sides = (_solved(evals, row, view, which) for evals, which in zip((left, right), both))
            out[a, b, row] = paired(*sides, any_eval(study)["classes"])
    return out


NONE = "\u2013"  # the cell of what was not measured


def sign_of(difference):
    """1 or -1 when the interval lies above or below 0, else 0."""
    return int(difference[1] > 0) - int(difference[2] < 0)


def percent(interval, sign=""):
    """("63.2", "[58.9, 67.4]"); sign "+" for differences. A dash for the mean of nothing."""
    if math.isnan(interval[0]):
        return NONE, ""
    mean, low, high = (round(100 * x, 1) + 0.0 for x in interval)             # + 0.0: no "-0.0"
    return f"{mean:{sign}.1f}", f"[{low:{sign}.1f}, {high:{sign}.1f}]"


def columns(study):
    """{row: its name} of the tables by stage: ROWS, and of walks the other looks too."""
    suite = str(any_eval(study).get("suite"))
    return ROWS | {row: ROWS.get(row, row) for row in any_eval(study)["rows"] if tasks.walks(suite)}


def table_rows(study, view):
    """The two tables of a view: the stages, then the paired differences. Cells are text or (number, interval)."""
    classes = any_eval(study)["classes"]
    words = {1: "excludes 0: higher", -1: "excludes 0: lower", 0: "includes 0: no clear difference"}
    score = lambda evals, row: percent(bootstrap(_solved(evals, row, view), classes)) if has(evals, row, view) else NONE
    return ([[label, *(score(evals, row) for row in columns(study))]
             for label, evals in stages(study, view).values()],
            [[f"{STAGES[a]} - {STAGES[b]}, {ROWS[row]}", percent(d, "+"), f"The interval {words[sign_of(d)]}."]
             for (a, b, row), d in differences(study, view).items()])


# What is said of every row where pictures are shown: (values, hands that they are averaged over) of solved and read (S, n).
MEASURES = {"success": lambda solved, read: (solved, None),
            "all cards read": lambda solved, read: (read == 1, None),
            "cards read": lambda solved, read: (read, None),
            "success where all cards were read": lambda solved, read: (solved, read == 1)}


def look_tables(study, view, measures=MEASURES):
    """{measure: (head, lines)} of hands in pictures: a line for every row that is answered, a column for every stage, and
    RL - SFT where both are averaged over the same hands."""
    last, stage = any_eval(study), stages(study, view)
    classes, keys = last["classes"], [key for key in ("base", "start", "sft end", "rl end") if key in stage]
    tables = {}
    for measure in measures:
        lines = []
        for row in (row for row in last["rows"] if row != "fake"):
            found = {key: MEASURES[measure](*(_solved(evals, row, (view[0], part)) for part in (view[1], "read")))
                     if has(evals := stage[key][1], row, view) else None for key in keys}
            cells = [percent(bootstrap(f[0], classes, among=f[1])) if f else NONE for f in found.values()]
            sft, rl = found.get("sft end"), found.get("rl end")
            if sft and rl and sft[1] is None:
                cells.append(percent(paired(*(f[0].astype(float) for f in (rl, sft)), classes), "+"))
            lines.append([ROWS.get(row, row), *cells])
        tables[measure] = ["", *(stage[key][0] for key in keys), "RL - SFT"][: len(lines[0])], lines
    return tables


def cost_of_seeing(study, view):
    """Lines (stage, paired difference): success on the cards in words minus success on their pictures, the same hands."""
    return [[label, percent(paired(*(_solved(evals, row, view) for row in ("text", "id")), any_eval(study)["classes"]), "+")]
            for label, evals in stages(study, view).values() if has(evals, "text", view)]


def step_tables(study, view):
    """{title: (head, lines)} of walks: what is right per step by stage (see `scores_per_step`), and where walks fail."""
    (mode, part), tables = view, {}
    for key in ("steps_first" if part == "first" else "steps", "forced", "read"):
        lines, pairs = table_rows(study, (mode, key))
        title = STEPS.get(key, "observations right").capitalize()
        tables[f"{title}, in %"] = ["", *columns(study).values()], lines
        pairs = [line for line in pairs if line[0].endswith(ROWS["rule"]) and key in STEPS]
        tables |= {f"{title}: paired differences on the same routes": (["", "points", ""], pairs)} if pairs else {}
    cases = [(f"{label}: {ROWS[row]}", evals, row) for row in ("id", "rule")
             for key, (label, evals) in stages(study, view).items() if key != "sft best"]
    return tables | failure_tables(cases, mode, any_eval(study)["classes"])


def failure_tables(cases, mode, classes, most=6):
    """{title: (head, lines)} of walks, a line for each of cases (label, {seed: evaluation}, row): where the first wrong answer
    is; then right first answers by kind of action, of all of that kind that were reached, so that long routes weigh more."""
    where, kinds = [], []
    for name, evals, row in cases:
        scores = [evals[seed]["rows"][row][mode] for seed in sorted(evals)]
        failed = [at if at is None else min(at, most) for s in scores for at in s["failed_at"]]
        where.append([name, *(f"{100 * failed.count(at) / len(failed):.1f}" for at in (*range(most + 1), None))])
        kinds.append([name])
        for field, kind in ((field, kind) for field in ("marks", "forced_marks") for kind in "TFS"):
            right, met = (np.array([[sum(map(word.count, both)) for word in s[field].split()] for s in scores])
                          for both in (kind, kind + kind.lower()))
            kinds[-1].append(percent(bootstrap(right / np.maximum(met, 1), classes, among=met)))
    actions = [kind + how for how in ("", ", forced") for kind in tasks.KINDS_OF_ACTION]
    return {"Where walks fail first, by position, in %": (["", *map(str, range(1, most + 1)), "later", "nowhere"], where),
            "Right first answers by kind of action, in %": (["", *actions], kinds)}


def more_tables(study, view, measures=MEASURES):
    """{title: (head, lines)}: what a view shows after success and its differences; of pictures so many measures."""
    suite, seeing = str(any_eval(study).get("suite")), cost_of_seeing(study, view)
    if tasks.walks(suite):
        return step_tables(study, view)
    tables = look_tables(study, view, measures) if tasks.pictures(suite) else {}
    return {f"Row by row: {measure} in %": table for measure, table in tables.items()} | (
        {"Success on cards in words minus on cards in pictures, the same hands": (["", "points"], seeing)} if seeing else {})


def _markdown(head, lines):
    lines = [head, *([cell if isinstance(cell, str) else " ".join(cell) for cell in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def table_text(study, only=None):
    """The closing tables in markdown, aligned for a terminal: every view, or `only` that one, each with its differences."""
    parts = []
    for view in [only] if only else views(study):
        (table, pairs), n = table_rows(study, view), len(any_eval(study)["classes"])
        parts.append(f"{view_name(view).capitalize()}: success in % [95 % interval], {n} problems")
        parts.append(_markdown(["", *columns(study).values()], table))
        parts += [_markdown(["paired difference", "points", ""], pairs)] if pairs else []
        if view == views(study)[0]:  # the report has the others, and more of reading
            for title, table in more_tables(study, view, list(MEASURES)[:2]).items():
                parts += [f"{view_name(view).capitalize()}, {title[0].lower()}{title[1:]}", _markdown(*table)]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- 7. Figures
# A panel is 430 x 330 units, its plot between LEFT..RIGHT and TOP..BOTTOM; the right margin holds the names of the lines.

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 330, 44, 352, 34, 278
# The vermilion, blue, green and purple of Okabe and Ito, darker on paper and lighter at night: text in them is 4.5 : 1
COLOURS = """:root{--paper:#fff;--ink:#1b1f24;--muted:#59636e;--grid:#dfe3e8;
--c0:#b84a00;--c1:#0067a3;--c2:#00765a;--c3:#a0397a}
@media (prefers-color-scheme:dark){:root{--paper:#15181d;--ink:#e8eaed;--muted:#a0a8b1;--grid:#343a42;
--c0:#ff9f4a;--c1:#5cb8f0;--c2:#3fc7a0;--c3:#e39ac6}}"""
FIGURE_CSS = """svg{color:var(--ink);font:12px system-ui,-apple-system,"Segoe UI",sans-serif;max-width:100%;height:auto}
svg text{fill:currentColor}svg .muted{color:var(--muted)}svg .head{font-weight:600;font-size:14px}
svg .grid{stroke:var(--grid)}svg .base{stroke:var(--muted);stroke-dasharray:2 4;stroke-width:1.5}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}
svg .c0{color:var(--c0)}svg .c1{color:var(--c1)}svg .c2{color:var(--c2)}svg .c3{color:var(--c3)}
svg .line{fill:none;stroke:currentColor;stroke-width:2.5;stroke-linejoin:round}svg .thin{stroke-width:1;opacity:.55}
svg .band{fill:currentColor;opacity:.16}svg .dot{fill:currentColor}
svg text.name{font-weight:600;stroke:var(--paper);stroke-width:4;paint-order:stroke;stroke-linejoin:round}"""


def si(flops, top=0):
    """2e12 -> "2 TFLOP"; the ticks of an axis share the unit of its `top`."""
    power = min(max(int(math.log10(max(top or flops, 1)) // 3), 0), 7)
    return f"{flops / 1000 ** power:.3g} {' KMGTPEZ'[power].strip()}FLOP"


def nice_ticks(low, high, most=4):
    """Multiples of 1, 2, 2.5 or 5 times a power of ten from low to high, at most `most` steps."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit * most >= (high - low) * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def curve(seeds, row, view):
    """(P, 4) FLOPs, mean, low, high along an arm, {seed: evaluations}, linear between evaluations.

    Seeds differ a little in FLOPs per step, so they are averaged at equal shares of their own FLOPs: their ends meet.
    """
    flops = {s: np.array([e["flops"] for e in evals]) for s, evals in seeds.items()}
    share = {s: x / (x[-1] or 1) for s, x in flops.items()}
    now, hands = share[min(seeds)], []
    for s, evals in seeds.items():
        solved = np.stack([e["solved"][(row, *view)] for e in evals])                    # (evaluations, n)
        at = np.interp(now, share[s], np.arange(len(evals)))
        hands.append([(1 - t % 1) * solved[int(t)] + t % 1 * solved[math.ceil(t)] for t in at])
    rates = [bootstrap(at, evals[0]["classes"]) for at in np.stack(hands, axis=1)]        # S hands lists at each of P points
    return np.column_stack([now * np.mean([x[-1] for x in flops.values()]), rates])


def to_panel(x, y, limits):
    """Data to panel units. (..., 2)"""
    x0, x1, y0, y1 = limits
    return np.stack([LEFT + (np.asarray(x, float) - x0) / (x1 - x0) * (RIGHT - LEFT),
                     BOTTOM - (np.asarray(y, float) - y0) / (y1 - y0) * (BOTTOM - TOP)], axis=-1)


def _stroke(points, css, close=""):
    return f'<path class="{css}" d="M{"L".join(f"{x:.1f},{y:.1f}" for x, y in points)}{close}"/>'
def _dot(point, radius, css):
    return f'<circle class="dot {css}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{radius}"/>'
def _text(x, y, text, css=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{esc(text)}</text>'


def axes(title, limits, x_ticks, y_ticks, x_name):
    """The frame of a panel: title (it names the y axis), grid, ticks [(value, label)] and the name of the x axis."""
    out = [_text(LEFT, 18, title, "head"), _text((LEFT + RIGHT) / 2, HEIGHT - 12, x_name, "mid muted")]
    for value, label in y_ticks:
        y = to_panel(limits[0], value, limits)[1]
        out += [_stroke([(LEFT, y), (RIGHT, y)], "grid"), _text(LEFT - 6, y + 4, label, "end muted")]
    for value, label in x_ticks:
        x = to_panel(value, limits[2], limits)[0]
        out += [_stroke([(x, BOTTOM), (x, BOTTOM + 4)], "grid"), _text(x, BOTTOM + 18, label, "mid muted")]
    return out


def named(ends, x=None):
    """Names beside the ends of lines, [(point, name, css)], moved apart where they would collide; at x, or at each point."""
    heights = np.array([point[1] for point, _, _ in ends], float)
    order = np.argsort(heights, kind="stable")
    for _ in range(100):                                       # each pair that is too close parts by half of what is missing
        for k, (i, j) in enumerate(zip(order, order[1:])):
            heights[[i, j]] += max(0, 16 - heights[j] + heights[i]) / 2 * np.array([-1, 1])
        heights -= max(0, heights.max(initial=0) - BOTTOM)
    out = []
    for (point, name, css), y in zip(ends, heights):
        at = x or point[0] + 9
        out += [_stroke([point, (at - 2, y)], f"line thin {css}"), _text(at, y + 4, name, css)]
    return out


def _curves_panel(study, row, view):
    """One panel: success in `row` along training FLOPs."""
    curves = {arm: curve(study[arm], row, view) for arm in arms_of(study)}
    top = max([c[-1, 0] for c in curves.values()], default=0) or 1.0
    limits, ends, percents = (0, top, 0, 1), [], [(v / 100, f"{v} %") for v in range(0, 101, 20)]
    ticks = [(0, "start")] + [(v, si(v, top)) for v in nice_ticks(0, top)[1:] if top > 1]
    out = axes(f"{ROWS[row]}: success", limits, ticks, percents, "training compute, counted from the start")
    if "base" in study:
        mean = _solved(stages(study, view)["base"][1], row, view).mean()
        line = to_panel([0, top], [mean, mean], limits)
        out.append(_stroke(line, "base"))
        ends.append((line[1], f"base {100 * mean:.0f}", "muted"))
    for i, (arm, c) in enumerate(curves.items()):
        line, low, high = (to_panel(c[:, 0], c[:, k], limits) for k in (1, 2, 3))
        out.append(_stroke([*high, *low[::-1]], f"band c{i % 4}", "Z"))
        for evals in study[arm].values() if len(study[arm]) > 1 else ():
            xs, ys = [min(e["flops"], top) for e in evals], [e["solved"][(row, *view)].mean() for e in evals]
            out.append(_stroke(to_panel(xs, ys, limits), f"line thin c{i % 4}"))
        out += [_stroke(line, f"line c{i % 4}"), _dot(line[-1], 4, f"c{i % 4}")]
        ends.append((line[-1], f"{name_of(arm)[:9]} {100 * c[-1, 1]:.0f}", f"name c{i % 4}"))
    return "".join(out + named(ends, RIGHT + 12))


def _svg(title, description, panels):
    shifted = "".join(f'<g transform="translate({i * WIDTH},0)">{panel}</g>' for i, panel in enumerate(panels))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}" role="img">'
            f"<title>{esc(title)}</title><desc>{esc(description)}</desc>{shifted}</svg>")


def svg_curves(study, view=("greedy", "first"), rows=("id", "rule")):
    """SVG, without its CSS: success along training FLOPs, a panel for each of `rows`; bands are 95 % intervals."""
    said = "; ".join(f"{line[0]}: ID {line[1][0]} %, rule OOD {line[2][0]} %" for line in table_rows(study, view)[0])
    return _svg(f"Success along training compute, {view_name(view)}", said, [_curves_panel(study, row, view) for row in rows])


def svg_path(study, view=("greedy", "first")):
    """SVG, without its CSS: rule OOD against ID, each arm's evaluations as a path from the start to its big end mark."""
    paths = {arm: np.stack([curve(study[arm], row, view)[:, 1] for row in ("id", "rule")]) for arm in arms_of(study)}
    xs, ys = np.concatenate([*paths.values()] or [np.full((2, 1), .5)], axis=1)
    limits = (max(math.floor(xs.min() * 10 - .5) / 10, 0), min(math.ceil(xs.max() * 10 + .3) / 10, 1),
              0, min(math.ceil(ys.max() * 10 + .3) / 10, 1))
    ticks = [[(v / 100, f"{v:.0f} %") for v in nice_ticks(100 * limits[i], 100 * limits[i + 1], 5)] for i in (0, 2)]
    out, ends = axes("rule OOD against ID, success", limits, *ticks, "ID success"), []
    for i, (arm, path) in enumerate(paths.items()):
        line, css = to_panel(*path, limits), f"c{i % 4}"
        out += [_stroke(line, f"line {css}"), *(_dot(p, 2.5, css) for p in line[:-1]), _dot(line[-1], 6, css)]
        ends.append((line[-1], name_of(arm)[:9], f"name {css}"))
    if paths:
        x, y = to_panel(xs[0], ys[0], limits)
        out += [_dot((x, y), 5, ""), _text(x - 9, y + 4, "start", "name end")]
    said = "; ".join(f"{name_of(arm)}: {' to '.join(f'ID {100 * p[0, k]:.1f} %, OOD {100 * p[1, k]:.1f} %' for k in (0, -1))}"
                     for arm, p in paths.items())
    return _svg(f"Rule OOD against ID along training, {view_name(view)}", said, ["".join(out + named(ends))])


def svg_standalone(svg):
    """The same figure as a file for <img>: with its style, its own paper, and a natural size that may shrink."""
    width, height = re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups()
    svg = svg.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    return svg.replace("<title>", f"<style>{COLOURS}{FIGURE_CSS}svg{{background:var(--paper)}}</style><title>", 1)


# ---------------------------------------------------------------- 8. Report

def verdict(sft, rl, gap, rl_id):
    """What happened under the other rule, from the signs of SFT - start, RL - start, RL - SFT (OOD), RL - start (ID)."""
    if gap <= 0:
        return "Under the other rule " + ("SFT ends above RL: the opposite of the published result." if gap else
                                          "the two arms end without a clear difference.")
    if sft >= 0 or rl < 0:
        return "RL ends above SFT under the other rule, but " + ("both lost part of it." if rl < 0 and sft < 0 else
                                                                 "SFT did not clearly lose it.")
    return (f"SFT lost the other rule and RL {'raised its score there' if rl else 'shows no clear loss'}: the published picture, "
            "SFT memorizes and RL generalizes." + ("" if rl_id > 0 else " But RL did not clearly improve under the trained rule "
                                                   "either, so it may just have changed little."))


def story(study, view=("greedy", "first")):
    """What happened, whichever way it came out, in sentences made from the numbers; the first is the verdict."""
    called, stage, d = words_for(any_eval(study).get("suite")), stages(study, view), differences(study, view)
    if any(key not in d for key in COMPARED):
        return ["This study does not hold both arms and their start yet."]
    sign, words = {key: sign_of(x) for key, x in d.items()}, {1: "rose", -1: "fell", 0: "did not clearly change"}
    points = {key: f"({' '.join(percent(x, '+'))} points)" for key, x in d.items()}
    sft_id, rl_id, sft, rl, gap, best, fake = COMPARED
    rates = [f"{100 * _solved(stage['start'][1], row, view).mean():.1f} %" for row in ("id", "rule")]
    differ = len({any_args(study, arm).get("lr") for arm in ("sft", "rl")}) > 1
    out = [verdict(sign[sft], sign[rl], sign[gap], sign[rl_id]) + differ * " The arms' learning rates differ: see below.",
           f"Scores are the share of {len(any_eval(study)['classes'])} held-out {called['things']} that are solved "
           f"({view_name(view)}) under the rule of training (ID: {called['trained']}) and under one that only the prompt states "
           f"(rule OOD: {called['other']}).",
           f"Both arms start from the same checkpoint, which solves {rates[0]} (ID) and {rates[1]} (rule OOD)."]
    for arm, on_id, on_rule in (("sft", sft_id, sft), ("rl", rl_id, rl)):
        spent = np.mean([e["flops"] for e in stage[f"{arm} end"][1].values()])
        out.append(f"With {si(spent)} of {name_of(arm)}, ID {words[sign[on_id]]} {points[on_id]} and rule OOD "
                   f"{words[sign[on_rule]]} {points[on_rule]}.")
    out.append(f"Against {stage['sft best'][0]}, RL is "
               f"{ {1: 'clearly higher', -1: 'clearly lower', 0: 'not clearly different'}[sign[best]]} {points[best]}; that "
               "checkpoint is chosen on these same problems, which favours SFT.")
    if sign[sft] < 0:
        out.append(f"Judged by the old rule, SFT's score on prompts that state the other one {words[sign[fake]]} {points[fake]}: "
                   + ("it goes on using the rule it was trained on." if sign[fake] > 0 else
                      "what it lost is not simply replaced by the old rule."))
    return out + story_of_steps(study, view) + story_of_looks(study, view)


def story_of_steps(study, view):
    """How far walks get on rule OOD, and what is right there after a right walk. List of sentences, [] for hands."""
    if not tasks.walks(str(any_eval(study).get("suite"))):
        return []
    ends = [(name_of(arm), stages(study, view)[f"{arm} end"][1], "rule") for arm in ("sft", "rl")]
    by_arm = lambda part: " and ".join(f"{100 * _solved(evals, row, (view[0], part)).mean():.1f} % ({name})"
                                       for name, evals, row in ends)
    kinds = failure_tables(ends, view[0], any_eval(study)["classes"])["Right first answers by kind of action, in %"][1]
    return [f"Step by step, rule OOD walks get through {by_arm('steps_first' if view[1] == 'first' else 'steps')} of their route "
            f"before they fail; after a right walk up to each position, {by_arm('forced')} of the first answers are right, and "
            f"of those that should turn {' and '.join(f'{line[4][0]} % ({line[0]})' for line in kinds)}.",
            "The first number stops at a mistake, the second goes on: where it is far higher, few steps fail most walks."]


def story_of_looks(study, view):
    """Which changes of look separate the arms and which do not, and how well each arm reads. List of sentences, [] for text."""
    last, stage = any_eval(study), stages(study, view)
    if not {"sft end", "rl end"} <= stage.keys() or not tasks.pictures(str(last.get("suite"))):
        return []
    sft, rl = (stage[key][1] for key in ("sft end", "rl end"))
    rows = [row for row in last["rows"] if row not in (*ROWS, SHUFFLED, "text") and has(sft, row, view) and has(rl, row, view)]
    sign = {row: sign_of(paired(_solved(rl, row, view), _solved(sft, row, view), last["classes"])) for row in rows}
    by_sign = {s: ", ".join(row for row in rows if sign[row] == s) for s in (1, -1, 0)}
    out = [f"Under other looks RL ends {word} SFT: {by_sign[s]}." for s, word in ((1, "clearly above"), (-1, "clearly below")) if by_sign[s]]
    out += [f"These looks do not separate the arms: {by_sign[0]}."] if by_sign[0] else []
    whole = (lambda read: read) if tasks.walks(last["suite"]) else (lambda read: read == 1)
    rates = [(sorted(100 * whole(_solved(evals, row, (view[0], "read"))).mean() for row in rows), arm)
             for evals, arm in ((sft, "SFT"), (rl, "RL"))]
    told = ", ".join(f"{f'{r[0]:.0f} to ' if len(rows) > 1 else ''}{r[-1]:.0f} % ({arm})" for r, arm in rates if rows)
    hardest = ", from the hardest look to the easiest" if len(rows) > 1 else ""
    return out + [words_for(last["suite"])["read"].format(told) + f"{hardest}."] * bool(rows)


def limits_of(study):
    """What the number of seeds, unequal compute and intervals without width mean for the reader. List of sentences."""
    seeds, n = min((len(study[arm]) for arm in arms_of(study)), default=1), len(set(any_eval(study)["classes"]))
    spent = [evals[-1]["flops"] for arm in arms_of(study) for evals in study[arm].values()]
    paper = {arm: np.mean([e[-1].get("flops_paper", 0) for e in study[arm].values()]) for arm in arms_of(study)}
    alike = words_for(any_eval(study).get("suite"))["alike"]
    out = [f"Brackets and bands are 95 % bootstrap intervals; {alike} are drawn together, as one class.",
           "There is one seed: an interval covers the luck of which problems were asked, not the luck of training. Another seed "
           "can come out differently, so this is an example, not evidence about the methods in general." if seeds == 1 else
           f"There are {seeds} seeds; they are resampled with the problems, so an interval covers the luck of training too"
           + (", but roughly: with so few seeds it tends to be too narrow." if seeds < 6 else "."),
           f"An interval without width, such as [0.0, 0.0], is not certainty: with {n} classes the true rate could still be "
           f"{min(300 / n, 100):.1f} points away, or more."]                                          # the rule of three
    if spent and max(spent) > 1.05 * min(spent):
        out.append(f"Compute is not equal, from {si(min(spent))} to {si(max(spent))} a run: compare the curves, not the ends.")
    rates = {arm: any_args(study, arm).get("lr") for arm in arms_of(study)}
    if len(set(rates.values()) - {None}) > 1:
        out.append("The arms have different peak learning rates (" + ", ".join(f"{name_of(arm)} {lr}" for arm, lr in rates.items()) + "). "
                   "How far an arm leaves its start depends much on that rate, so a difference between these two runs is one between "
                   "settings; only the same comparison over rates says what the method does.")
    if len(paper) > 1 and all(paper.values()):
        out.append("Compute counts what was computed here, with a KV cache and prompts read once per group; by the paper's formula, which "
                   "has neither, " + " and ".join(f"{name_of(arm)} spent {si(flops)}" for arm, flops in paper.items()) + ".")
    return out


PAGE_CSS = """*{box-sizing:border-box}:root{color-scheme:light dark;background:var(--paper)}
body{margin:0 auto;padding:1.2rem 1rem 4rem;max-width:62rem;color:var(--ink);font:16px/1.55 system-ui,-apple-system,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.4rem 0}h2{font-size:1.15rem;margin:2rem 0 .4rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
h1,h3,td,th{overflow-wrap:break-word}p{max-width:46rem}.figures{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}svg{display:block;width:100%}.wide{overflow-x:auto}
table{border-collapse:collapse;margin:.5rem 0;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--grid);font-weight:400}
td i{font-style:normal;color:var(--muted);white-space:nowrap}.small{color:var(--muted);font-size:.9rem}
details{border-top:1px solid var(--grid);padding:.5rem 0}summary{cursor:pointer;font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;padding:.5rem .7rem;font-size:.82rem;border-left:3px solid var(--grid)}
pre.answer{border-color:var(--c1)}.cards{width:12rem;max-width:100%;image-rendering:pixelated}
.walk{display:grid;gap:1.2rem;align-items:start;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.walk>div{overflow-wrap:anywhere;min-width:0}.map{width:340px;max-width:100%}
@media (min-width:45rem){.walk{grid-template-columns:20rem 1fr}.walk>:first-child{position:sticky;top:1rem}}
.step{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin-bottom:.8rem}.step div{flex:1 1 14rem;min-width:0}
.step .cards{align-self:start}
@media (max-width:30rem){table{font-size:.82rem}th,td{padding-right:.5rem}}"""
MATTER = ("model", "suite", "rule", "visual", "lr", "steps", "flops", "batch", "group", "attempts", "temperature", "seed")


def _table(head, lines):
    cell = lambda c: esc(c) if isinstance(c, str) else f"{esc(c[0])} <i>{esc(c[1])}</i>"
    lines = [f"<tr><th scope=row>{cell(line[0])}</th>{''.join(f'<td>{cell(c)}</td>' for c in line[1:])}</tr>" for line in lines]
    return f'<div class=wide><table><tr>{"".join(f"<th scope=col>{esc(h)}</th>" for h in head)}</tr>{"".join(lines)}</table></div>'


def _results(study, view):
    """Figures, table and paired differences of one view."""
    table, pairs = table_rows(study, view)
    out = f"<h3>Success in % [95 % interval]</h3>{_table(['', *columns(study).values()], table)}"
    if pairs:
        out += f"<h3>Paired differences on the same problems</h3>{_table(['', 'points', ''], pairs)}"
    for title, table in more_tables(study, view).items():
        out += f"<h3>{title}</h3>{_table(*table)}"
    if not arms_of(study):
        return out
    figures = svg_curves(study, view, ["id"]), svg_curves(study, view, ["rule"]), svg_path(study, view)
    return (f"<div class=figures>{''.join(figures)}<p class=small>Bands are 95 % intervals; with several seeds, thin lines are "
            "single seeds and thick ones their mean. In the third figure each dot is an evaluation and the large dot the end: "
            f"further right is better under the trained rule, higher is better under the other one.</p></div>{out}")


def _settings(study):
    """Flags of each arm's first seed: those that differ between arms, and those that matter anyway."""
    args = {name_of(arm): seeds[min(seeds)][-1]["args"] for arm, seeds in study.items()}
    keys = dict.fromkeys(key for flags in args.values() for key in flags)
    lines = [[key, *(str(flags.get(key, NONE)) for flags in args.values())] for key in keys]
    return _table(["flag", *args], [line for line in lines if line[0] in MATTER or len(set(line[1:])) > 1])


def _picture(png, css, alt):
    return f'<img class={css} alt="{alt}" src="data:image/png;base64,{esc(png)}">'


def _turn(turn, views):
    """An answer and its verdict; of a walk also its position, what the answer says, and, once, the view there, from `views`."""
    told = f"verifier: {esc(turn.get('outcome', ''))}, reward {esc(turn.get('reward', ''))}. {esc(turn.get('feedback') or '')}"
    told = f"<pre class=answer>{esc(turn['response'])}</pre><p class=small>{told}</p>"
    if "position" not in turn:
        return told
    try:
        said = tasks.read_answer(str(turn["response"]))
    except ValueError:
        said = {}
    keys = (*zip(*(words["keys"] for words in tasks.WORDING.values())), ("action",))  # in every style
    parts = [f"{word} <b>{esc(next((said[key] for key in names if key in said), NONE))}</b>"
             for word, names in zip(("observed", "following", "action"), keys)]
    view = _picture(views.pop(turn["position"]), "cards", "the view from there") if turn["position"] in views else ""
    return f"<div class=step>{view}<div><b>position {turn['position'] + 1}</b>: {' / '.join(parts)}{told}</div></div>"


def _episodes(study, arm, most=3):
    """Up to `most` ID and rule OOD episodes of the arm's latest evaluation that has samples, one of other rows; all walks."""
    e = next((e for e in reversed(study[arm][min(study[arm])]) if e["samples"]), {"samples": [], "rows": ()})
    out, few = [], lambda row: most if row in ROWS or tasks.walks(str(e["suite"])) else 1
    for sample in (s for row in e["rows"] for s in [s for s in e["samples"] if s["row"] == row][: few(row)]):
        out.append(f"<h3>{esc(ROWS.get(sample['row'], sample['row']))}, return {esc(sample['reward'])}</h3>")
        out += [_picture(sample["picture"], "cards", "what the model saw")] if "picture" in sample else []
        asked, views = f"<pre>{esc(sample['prompt'])}</pre>", dict(enumerate(sample.get("pictures", ())))
        turns = "".join(_turn(turn, views) for turn in sample["turns"])
        if "map" in sample:
            asked, turns = f"<div>{_picture(sample['map'], 'map', 'the route on its map')}{asked}</div>", f"<div>{turns}</div>"
        out.append(f"<div class=walk>{asked}{turns}</div>" if "map" in sample else asked + turns)
    return (f"<details><summary>Sample episodes: {esc(name_of(arm))}, seed {min(study[arm])}, step {e['step']}</summary>"
            f"{''.join(out)}</details>") if out else ""


def report_html(study_dir):
    """The report of a study directory: one HTML page that loads nothing and runs nothing. Errors as in `load_study`."""
    study = load_study(study_dir)
    (first, *others), (verdict_, *rest) = views(study), story(study)
    title = esc(f"SFT and RL from one start: {any_eval(study).get('suite')}, {Path(study_dir).resolve().name}")
    more = "".join(f"<details><summary>The same, {view_name(v)}</summary>{_results(study, v)}</details>" for v in others)
    return f"""<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{COLOURS}{FIGURE_CSS}{PAGE_CSS}</style></head><body><main><h1>{title}</h1>
<p><strong>{esc(verdict_)}</strong> {esc(" ".join(rest))}</p><h2>Results, {view_name(first)}</h2>{_results(study, first)}{more}
<h2>What this can and cannot show</h2><p>{esc(" ".join(limits_of(study)))}</p><h2>Behind the numbers</h2>
{"".join(_episodes(study, arm) for arm in study)}<details><summary>Settings</summary>{_settings(study)}</details></main></body></html>
"""


def write_report(study_dir):
    """Write `report.html` into the study directory, whole or not at all. Returns its path."""
    path = Path(study_dir) / "report.html"
    page = report_html(study_dir)
    write_atomically(path, lambda p: p.write_text(page, "utf-8"))
    return path


# ---------------------------------------------------------------- 9. Command line


def result_table(result):
    """Success of one evaluation with intervals, as markdown; of walks also per step, and below it where they fail."""
    walk, lines = tasks.walks(result["suite"]), []
    last = {"steps_first": "per step", "forced": "teacher-forced"} if walk else {}
    last["read"] = "observations right" if walk else "all cards read"
    for name, modes in result["rows"].items():
        scores = [modes[mode][part] for mode in MODES for part in PARTS] + [np.array(modes["greedy"][part]) for part in last]
        scores[-1] = scores[-1] if walk else scores[-1] == 1
        lines.append([name, *(" ".join(percent(bootstrap(score, result["row_classes"][name]))) for score in scores)])
    head = ["row", *(view_name((mode, part)) for mode in MODES for part in PARTS), *(f"greedy, {name}" for name in last.values())]
    more = failure_tables([(row, {0: result}, row) for row in result["rows"]], "greedy", result["classes"]) if walk else {}
    return "\n\n".join([_markdown(head, lines), *(f"{title}, greedy\n\n{_markdown(*table)}" for title, table in more.items())])


def compare_table(results, names):
    """Two evaluations of one suite on the same problems: their success, of walks also per step, and the paired difference."""
    lines = []
    for row, mode in ((row, mode) for row in results[0]["rows"] for mode in MODES):
        for part in (part for part in ("episode", *STEPS) if part in results[0]["rows"][row][mode]):
            first, second = (result["rows"][row][mode][part] for result in results)
            classes = results[0]["row_classes"][row]
            cells = (percent(bootstrap(first, classes)), percent(bootstrap(second, classes)), percent(paired(second, first, classes), "+"))
            lines.append([", ".join([row, MODES[mode], *([STEPS[part]] if part in STEPS else [])]), *map(" ".join, cells)])
    return _markdown(["row", *map(clean, names), "second - first"], lines)


def parse_args(argv=None):
    """Command line of evaluation."""
    parser = Parser("Evaluate a model on held-out problems, or write the report of a study.")
    parser.add_argument("model", nargs="?", help="tiny (the shipped base), a run directory or a model directory")
    parser.add_argument("--report", metavar="STUDY", help="print the tables of a study directory and write its report.html")
    parser.add_argument("--compare", metavar=("A", "B"), nargs=2, help="evaluate two models on the same problems, with paired differences")
    parser.add_argument("--choose", metavar="GRID", help="print a grid's ID validation scores and the learning rates to take")
    parser.add_argument("--suite", default="gp-l", help=f"one of {', '.join(tasks.SUITES)}")
    parser.add_argument("--n", type=int, default=500, help="held-out problems per row")
    parser.add_argument("--attempts", type=int, default=1, help="answers an episode may have, on a walk at each position")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="val chooses settings, test is for claims")
    parser.add_argument("--k", type=int, default=0, help="also sample K answers per problem and print pass@1 .. pass@K")
    parser.add_argument("--max-new-tokens", type=int, help="tokens per answer (default: 64 tiny, 256 else)")
    parser.add_argument("--rows", type=int, default=256, help="episodes computed side by side")
    parser.add_argument("--out", help="run directory to put evals/000000.json into, for a report")
    parser.add_argument("--ask", metavar="TEXT", help="print the model's likeliest answer to this, and do nothing else")
    parser.add_argument("--image", metavar="FILE", help="a picture that goes with --ask")
    parser.add_argument("--export", metavar="DIR", help="write the model there as the hub has it, adapters merged, in bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.model, args.report, args.choose, args.compare))) != 1:
        raise ValueError("give one of: a model to evaluate, --compare and two models, --report and a study directory, --choose and "
                         "a grid of runs.")
    if args.suite not in tasks.SUITES:
        raise ValueError(f"--suite must be one of {', '.join(tasks.SUITES)}.")
    if args.out and (Path(args.out).is_file() or (Path(args.out) / "args.json").exists() or (Path(args.out) / "evals/000000.json").exists()):
        raise ValueError(f"{args.out} holds a run or an evaluation already; choose another --out.")
    if args.image and not args.ask:
        raise ValueError("--image goes with --ask: give a question about the picture.")
    check_limits(args)
    return args


def ask(model, tokenizer, text, image, max_new_tokens):
    """Greedy answer to one question about a picture (a path or None). ValueError for a picture that cannot be read."""
    seen = model.see(*pack_images([[open_image(image)]], model.config.vision.image_size)) if image else None
    ids, lengths = pad_rows([tokenizer.prompt(text, image=bool(image))], tokenizer.pad, model.device)
    cache = Cache(model, 1, ids.shape[1] + max_new_tokens, seen)
    (answer,), _ = generate(model, cache, model.extend(cache, ids, lengths), max_new_tokens, tokenizer.stop_ids, 0.0)
    return tokenizer.decode(answer)


def write_study(directory):
    """Print the tables of a study and write its report and the figures as files for a README."""
    study = load_study(directory)
    print(table_text(study))
    for name, svg in (("curves", svg_curves(study)), ("path", svg_path(study))):
        write_atomically(Path(directory) / f"{name}.svg", lambda p: p.write_text(svg_standalone(svg), "utf-8"))
    print(f"report: {write_report(directory)}")
    return study


def load(name, args):
    """(model, tokenizer) of what a name on the command line means."""
    return load_model(find_model(name, args.suite.removesuffix("-probes")), *device_and_dtype(args.device)[::-1])


def evaluate_as_told(model, tokenizer, args):
    """`evaluate` with the flags of the command line."""
    return evaluate(model, tokenizer, args.suite, args.n, args.attempts, args.split,
                    args.max_new_tokens or answer_length(tokenizer), args.rows)


def compare(args):
    """Evaluate two models, one after the other in memory, and print their table. Returns both evaluations."""
    results = [evaluate_as_told(*load(name, args), args) for name in args.compare]
    print(f"{args.suite}, {args.n} {args.split} problems, success of whole episodes in % [95 % interval]")
    print(compare_table(results, args.compare))
    return results


def main(argv=None):
    """Evaluate or report; returns the evaluation, or the study."""
    args = parse_args(argv)
    if args.report:
        return write_study(args.report)
    if args.choose:
        return choose_rates(args.choose)
    if args.compare:
        return compare(args)
    model, tokenizer = load(args.model, args)
    if args.export:
        save_model(model, tokenizer, args.export, torch.bfloat16)
        print(f"written: {clean(args.export)}")
        return {}
    if args.ask:
        with torch.no_grad():
            print(clean(ask(model, tokenizer, args.ask, args.image, args.max_new_tokens or answer_length(tokenizer))))
        return {}
    result = evaluate_as_told(model, tokenizer, args)
    print(f"{clean(args.model)} on {args.suite}, {args.n} {args.split} problems, success in % [95 % interval]")
    if small := [row.name for row in tasks.SUITES[args.suite] if row.name not in result["rows"]]:
        print(f"left out, since tiles of {model.config.vision.image_size} pixels are too small to show it: {', '.join(small)}")
    print(result_table(result))
    if args.k:
        result["pass_at_k"] = pass_at_1_to_k(model, tokenizer, args.suite, args.n, args.k, args.split,
                                             args.max_new_tokens or answer_length(tokenizer), args.rows)
        lines = [[name, *(f"{100 * p:.1f}" for p in curve)] for name, curve in result["pass_at_k"].items()]
        print("\n" + _markdown(["row", *(f"pass@{j}" for j in range(1, args.k + 1))], lines))
    if args.out:
        (Path(args.out) / "evals").mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out) / "evals" / "000000.json", result | {"step": 0, "flops": 0, "seconds": 0.0})
    return result


if __name__ == "__main__":
    run_main(main)
