"""Rollouts, the ID/OOD suites, intervals, tables, plots and the report.

  1. Episodes and rollout   prompt, response, verifier, ... as one growing list of token ids
  2. Encoded pictures       each is encoded once, for all episodes, turns and the training pass
  3. Evaluation             the same held-out problems under every rule, greedy and at temperature 1
  4. Runs and models        what a name on the command line means, and text that is safe to show
  5. Intervals              bootstrap over classes, paired differences, pass@k
  6. A study                the evaluations of all arms and seeds
  7. Tables                 what the terminal, the report and the README show
  8. Figures                SVG, written here
  9. Report                 one HTML page that loads nothing and runs nothing
 10. Command line           `evaluate.py runs/demo/rl --suite gp-l`, `evaluate.py --report runs/demo`

Shapes: P problems, G episodes of one problem (a group), B = P * G rows, T tokens.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
import torch

import tasks
from model import (Cache, ImageContext, Sampling, generate, load_model, open_image, pack_images,
                   pad_rows, save_model, write_atomically, write_json)

# ---- 1. Episodes and rollout ---------------------------------------------------------------------


@dataclass
class Episode:
    """One problem answered by the policy: token ids that only ever grow, and what each of them is.

    ids            everything the model reads: prompt, responses, verifier text
    response_mask  1 where the policy sampled the token, its stop token included; 0 elsewhere
    log_probs      log-probability under the policy that sampled it; 0.0 where the mask is 0
    turns          a dict for each answer: response and verdict, and position where problems lead on
    pictures       the pictures shown so far, one for each <|image|> among the ids
    encoded        the same pictures as the rollout encoded them; empty without a rollout
    """
    problem: tasks.Problem
    ids: list = field(default_factory=list)
    response_mask: list = field(default_factory=list)
    log_probs: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    encoded: list = field(default_factory=list)

    @classmethod
    def start(cls, problem: tasks.Problem, tokenizer) -> "Episode":
        """An episode with the problem's prompt, and its picture if it has one."""
        episode = cls(problem, pictures=[] if problem.image is None else [problem.image])
        episode.append_context(tokenizer.prompt(problem.prompt, image=bool(episode.pictures)))
        return episode

    def copy(self) -> "Episode":
        """Another episode of the group, which goes on by itself. Pictures stay the same objects."""
        lists = {name: [*value] for name, value in vars(self).items() if name != "problem"}
        return Episode(copy.copy(self.problem), **lists)

    def append_context(self, ids: list) -> None:
        """Append tokens that the policy did not choose."""
        self.ids += ids
        self.response_mask += [0] * len(ids)
        self.log_probs += [0.0] * len(ids)

    def append_response(self, ids: list, log_probs: list | None = None) -> None:
        """Append a response: tokens that the policy sampled (or a demonstrator wrote)."""
        self.ids += ids
        self.response_mask += [1] * len(ids)
        self.log_probs += log_probs or [0.0] * len(ids)

    def verify(self, tokenizer, text: str) -> bool:
        """Let the verifier judge the response just appended, and open the next turn. -> done"""
        step = self.record(self.problem, text)
        if not step.done:
            if self.ids[-1] not in tokenizer.stop_ids:  # cut off at max_new_tokens
                self.append_context([tokenizer.eot])  # not sampled, so not in the mask
            self.append_feedback(tokenizer, step)
        return step.done

    def record(self, problem: tasks.Problem, text: str) -> tasks.Step:
        """Let a problem judge a response, and write the verdict down in `turns`."""
        place = {"position": problem.position} if problem.leads_on else {}
        step = problem.step(text)
        self.turns.append({"response": text, "outcome": step.outcome, "reward": step.reward,
                           "feedback": step.feedback, "read": step.read} | place)
        return step

    def append_feedback(self, tokenizer, step: tasks.Step) -> None:
        """Append the verifier's text; after a right action it stands behind the next picture."""
        moved = step.outcome == "right_action" and self.problem.image is not None
        self.pictures += [self.problem.image] if moved else []
        self.append_context(tokenizer.turn(step.feedback, image=moved))

    def replace_by_expert(self, tokenizer, text: str) -> bool:
        """Judge the response just appended, then put the expert's in its place. -> done"""
        self.record(copy.copy(self.problem), text)
        while self.response_mask[-1]:
            del self.ids[-1], self.response_mask[-1], self.log_probs[-1]
        expert, step = self.problem.advance()
        self.append_context([*tokenizer.encode(expert), tokenizer.eot])
        if not step.done:
            self.append_feedback(tokenizer, step)
        return step.done

    def total(self, discount: float = 1.0) -> float:
        """The episode's return: the discounted sum of its rewards."""
        return sum(discount**t * turn["reward"] for t, turn in enumerate(self.turns))

    def solved(self, attempts: int | None = None) -> bool:
        """Whether one of the first `attempts` answers (default: any) solved the problem."""
        return tasks.solved([turn["outcome"] for turn in self.turns], attempts)

    @property
    def response_tokens(self) -> int:
        """The number of sampled tokens."""
        return sum(self.response_mask)


@torch.no_grad()
def rollout(model, tokenizer, problems: list, group: int, sampling: Sampling, forced=False) -> list:
    """Play `group` episodes of every problem with the verifier in the loop.

    problems: P fresh instances of tasks.Problem; each is copied, so they stay unused.
    sampling: its `batch` is the number of episodes computed side by side, at least one group.
    forced, where problems lead on: each answer is judged behind the expert's earlier answers
    (teacher forcing). Returns a list of P lists of G Episodes.

    Each prompt is computed once, for its group; each picture is encoded once; the KV cache lives
    through all turns; finished episodes leave the batch. The cache holds the latest picture only.
    """
    groups, size = [], max(1, sampling.batch // group)
    for first in range(0, len(problems), size):
        part = problems[first : first + size]
        groups += rollout_batch(model, tokenizer, part, group, sampling, forced)
    return groups


def rollout_batch(model, tokenizer, problems, group, sampling, forced):
    """`rollout` of the problems that are computed side by side."""
    # 1. Read every prompt once. Its group goes on from there.
    started = [Episode.start(copy.copy(problem), tokenizer) for problem in problems]
    known = {}  # the pictures that are encoded already
    images = encode_new_pictures(model, started, known)
    ids, lengths = pad_rows([episode.ids for episode in started], tokenizer.pad, model.device)
    cache = Cache(model, len(problems), ids.shape[1] + sampling.max_new_tokens, images)
    logits = model.extend(cache, ids, lengths)
    rows = torch.arange(len(problems), device=model.device).repeat_interleave(group)
    cache.select(rows)
    logits = logits[rows]
    groups = [[episode.copy() for _ in range(group)] for episode in started]
    playing = [episode for members in groups for episode in members]
    while True:
        # 2. Sample a response for each episode.
        length = cache.length
        responses, log_probs = generate(model, cache, logits, sampling, tokenizer.stop_ids)
        for episode, response, values in zip(playing, responses, log_probs):
            episode.append_response(response, values)
        # 3. Let the verifier judge it. Finished episodes leave.
        if forced:
            cache.length = length  # the expert's answers are written over the responses
        verify = Episode.replace_by_expert if forced else Episode.verify
        going = [i for i, (episode, response) in enumerate(zip(playing, responses))
                 if not verify(episode, tokenizer, tokenizer.decode(response))]
        if not going:
            return groups
        playing = [playing[i] for i in going]
        cache.select(torch.tensor(going, device=model.device))
        # 4. Read the verifier's text, and first the last sampled token, which the cache lacks.
        new = [e.ids[start:] for e, start in zip(playing, cache.length.tolist())]
        ids, lengths = pad_rows(new, tokenizer.pad, model.device)
        images = encode_new_pictures(model, playing, known)
        cache.add_images(images)
        cache.reserve(ids.shape[1] + sampling.max_new_tokens)
        logits = model.extend(cache, ids, lengths)
        if images is not None:
            cache.keep_latest_image()


def prompt_of(episode: Episode) -> tuple:
    """What the episodes of a group have in common: the ids of the prompt, and its picture."""
    return tuple(episode.ids[: episode.response_mask.index(1)]), *map(id, episode.pictures[:1])


def by_prompt(episodes: list) -> list:
    """Lists of the episodes that have the same prompt."""
    groups = {}
    for episode in episodes:
        groups.setdefault(prompt_of(episode), []).append(episode)
    return list(groups.values())


def micro_batches(episodes: list, size: int) -> list:
    """Lists of at most `size` episodes. Any size gives the same sum of gradients.

    A prompt is computed once for its episodes, so they stay together where they fit. Similar
    lengths stand together, which makes little padding."""
    batches = [[]]
    groups = [sorted(group, key=lambda e: len(e.ids)) for group in by_prompt(episodes)]
    for group in sorted(groups, key=lambda group: len(group[-1].ids)):
        for piece in (group[i : i + size] for i in range(0, len(group), size)):
            if len(batches[-1]) + len(piece) > size:
                batches.append([])
            batches[-1] += piece
    return batches


class Batch(NamedTuple):
    """Episodes as tensors (B, T), padded on the right."""
    ids: torch.Tensor  # long
    chosen: torch.Tensor  # bool, the response mask
    old_log_probs: torch.Tensor  # float32


def to_batch(episodes: list, pad: int, device) -> Batch:
    """Episodes of any lengths, in their order, as one Batch."""
    ids, _ = pad_rows([episode.ids for episode in episodes], pad, device)
    chosen, _ = pad_rows([episode.response_mask for episode in episodes], 0, device)
    log_probs, _ = pad_rows([episode.log_probs for episode in episodes], 0.0, device)
    return Batch(ids, chosen.bool(), log_probs)


# ==== The reading path ends here. Everything below can be skipped. ====

# ---- 2. Encoded pictures -------------------------------------------------------------------------


class EncodedPicture(NamedTuple):
    """A picture as the decoder sees it: set number `number` of an ImageContext with one each."""

    context: ImageContext
    number: int

    def parts(self):
        """Its features (M * P, D) and which of its M tiles exist."""
        return self.context.features[self.number], self.context.tiles[self.number]


def encode_pictures(model, pictures: list) -> list:
    """An EncodedPicture for each of the pictures; one that comes twice is encoded once."""
    different = {id(picture): [picture] for picture in pictures}
    if not different:
        return []
    size = model.config.vision.image_size
    context = model.encode_images(*pack_images([*different.values()], size))
    encoded = {key: EncodedPicture(context, i) for i, key in enumerate(different)}
    return [encoded[id(picture)] for picture in pictures]


def encode_new_pictures(model, episodes: list, known: dict) -> ImageContext | None:
    """The pictures that episodes of a rollout were shown since the last call, None without any.

    known: {id of a picture: EncodedPicture}, grows by those that are encoded here. ValueError for
    a second picture where tokens before the first one would attend to it too: it was not there
    when they were computed.
    """
    new = [episode.pictures[len(episode.encoded) :] for episode in episodes]
    later = any(episode.encoded and pictures for episode, pictures in zip(episodes, new))
    if later and not model.config.mask_prefix_attention:
        raise ValueError("a model whose first tokens look at all pictures cannot be shown one "
                         "after the other: set mask_prefix_attention to true in its config.json, "
                         "as Meta's code has it.")
    unknown = {id(picture): picture for pictures in new for picture in pictures
               if id(picture) not in known}
    known.update(zip(unknown, encode_pictures(model, [*unknown.values()])))
    rows = [[known[id(picture)] for picture in pictures] for pictures in new]
    for episode, row in zip(episodes, rows):
        episode.encoded += row
    return merge_contexts(rows)


def merge_contexts(rows: list) -> ImageContext | None:
    """One ImageContext for rows of text that see several pictures each: lists of EncodedPictures
    in the order of their <|image|> tokens. Rows with equal lists share a set; None without any."""
    keys = [tuple(map(id, row)) for row in rows]
    sets = dict(zip(keys, rows))
    if not any(sets):
        return None
    context = next(picture.context for row in rows for picture in row)
    blank = [torch.zeros_like(part) for part in (context.features[0], context.tiles[0])]
    count = max(map(len, rows))
    padded = [[picture.parts() for picture in row] + [blank] * (count - len(row))
              for row in sets.values()]
    features, tiles = (torch.stack([torch.cat(part) for part in parts])
                       for parts in zip(*(zip(*row) for row in padded)))
    number = {key: i for i, key in enumerate(sets)}
    rows = torch.tensor([number[key] for key in keys], device=tiles.device)
    return ImageContext(features, tiles, rows, context.prefix_looks)


def images_for(model, episodes: list) -> ImageContext | None:
    """The ImageContext for a training pass over episodes, in their order; None for text.

    While tower or projector are trained the pictures are encoded here, with gradient; else the
    rollout's encoding is used again. Each episode of a group has a beginning of the same list of
    pictures, so the longest list serves them all: a mask hides the rest. The mask has
    B x T x (tokens of all pictures of a set) entries.
    """
    fullest = {}
    for members in by_prompt(episodes):
        fullest[prompt_of(members[0])] = max(members, key=lambda episode: len(episode.pictures))
    encoded = {key: episode.encoded for key, episode in fullest.items()}
    if model.trains_vision or not all(e.encoded or not e.pictures for e in episodes):
        shown = [picture for episode in fullest.values() for picture in episode.pictures]
        with torch.set_grad_enabled(model.trains_vision and torch.is_grad_enabled()):
            found = iter(encode_pictures(model, shown))
        encoded = {key: [next(found) for _ in e.pictures] for key, e in fullest.items()}
    return merge_contexts([encoded[prompt_of(episode)] for episode in episodes])


# ---- 3. Evaluation -------------------------------------------------------------------------------

ROWS = {"id": "ID", "rule": "rule OOD", "fake": "fake rule"}  # of every suite: name and title
SHUFFLED = "shuffled"  # the control: a model that looks at the cards fails here, a guesser does not
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
SAMPLES = 4  # episodes of a row that an evaluation shows


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated, and how."""

    suite: str
    n: int  # held-out problems per row
    attempts: int = 1  # answers per question
    split: str = "test"
    max_new_tokens: int = 64  # per answer
    batch: int = 256  # episodes computed side by side
    rows: tuple | None = None  # only these rows of the suite


def evaluate(model, tokenizer, settings: EvalSettings) -> dict:
    """How a model does on the rows of a suite: for every problem its task's SCORES.

    Rows whose rules have the same target and number of cards deal the same n held-out hands.
    "greedy" is temperature 0, "sampled" temperature 1. A row with `judged_by` ("fake rule") judges
    the answers of the row with the same prompt once more, by the other rule. Where problems lead
    on, it is played anew, since the verifier decides which question is next.

    Returns plain data for JSON: rows[row][mode][score] is a list of n numbers.
    """
    began, rows = time.time(), legible_rows(model, settings)
    classes, scores, samples, turns, truncations = {}, {}, [], {}, []
    for row in rows:
        problems = suite_problems(model, tokenizer, settings, row)
        classes[row.name], scores[row.name] = [problem.cls for problem in problems], {}
        answered = None if problems[0].leads_on else same_prompt(rows, row)
        for mode, temperature in TEMPERATURES.items():
            forced = [None] * len(problems)
            if answered:
                turns[row.name, mode] = [judge_again(*pair) for pair in
                                         zip(problems, turns[answered.name, mode])]
            else:
                episodes = play(model, tokenizer, problems, 1, settings, temperature)
                turns[row.name, mode] = [episode.turns for episode in episodes]
                truncations.append(truncated(episodes, tokenizer))
                if mode == "greedy":
                    samples += [show_episode(row.name, e) for e in chosen_samples(episodes)]
            if problems[0].leads_on:
                forced = play(model, tokenizer, problems, 1, settings, temperature, forced=True)
                forced = [episode.turns for episode in forced]
            scores[row.name][mode] = as_lists(
                [problem.scores(*each) for problem, *each in
                 zip(problems, turns[row.name, mode], forced)])
    return {"suite": settings.suite, "split": settings.split, "n": settings.n,
            "attempts": settings.attempts, "classes": next(iter(classes.values())),
            "row_classes": classes, "truncated": max(truncations), "rows": scores,
            "samples": limit_pictures(samples), "eval_seconds": round(time.time() - began, 2)}


def legible_rows(model, settings):
    """The rows of the suite, or those asked for, whose pictures this model's tiles can show."""
    problem, size = tasks.task_of(settings.suite).problem, model.config.vision.image_size
    return [row for row in tasks.suite_rows(settings.suite)
            if problem.legible(row, size) and (not settings.rows or row.name in settings.rows)]


def suite_problems(model, tokenizer, settings, row):
    """The n problems of one row of a suite, as they are put to this model."""
    name, style = settings.suite.removesuffix("-probes"), prompt_style(model, tokenizer)
    problems = [tasks.make(name, row.rule, row.visual, settings.split, i, settings.attempts,
                           judged_by=row.judged_by, **style) for i in range(settings.n)]
    if row.name == SHUFFLED:
        pictures = [problem.image for problem in problems]
        for problem, picture in zip(problems, pictures[1:] + pictures[:1]):
            problem.image = picture
    return problems


def prompt_style(model, tokenizer) -> dict:
    """How problems are put to a model, for tasks.make: the tiny tokenizer gets short prompts,
    pictures fit the model's tiles."""
    return {"style": "short" if tokenizer.short else "full",
            "tile": model.config.vision.image_size}


def same_prompt(rows, row):
    """The row whose answers this one judges once more, None where it has answers of its own."""
    wanted = row._replace(name="", judged_by=None)
    found = [other for other in rows if other._replace(name="") == wanted]
    return found[0] if row.judged_by and found else None


def judge_again(problem, turns):
    """The turns of an episode with the outcomes that another problem's verifier gives."""
    return [turn | {"outcome": copy.copy(problem).step(turn["response"]).outcome}
            for turn in turns]


def play(model, tokenizer, problems, group, settings, temperature, forced=False):
    """Episodes of all problems, group by group, with a random stream of their own.

    What was encoded for a batch is dropped before the next one, and so are the pictures where they
    are large: a walk has a megabyte or more at every position.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    sampling = Sampling(settings.max_new_tokens, temperature, generator, settings.batch)
    episodes, size = [], max(1, settings.batch // group)
    for first in range(0, len(problems), size):
        part = problems[first : first + size]
        for members in rollout(model, tokenizer, part, group, sampling, forced=forced):
            episodes += members
        for episode in episodes[first * group :]:
            episode.encoded = []
            if model.config.vision.image_size > 100:
                episode.pictures = []
                getattr(episode.problem, "drawn", {}).clear()
    return episodes


def as_lists(scores):
    """[{name: value}, ...] of n problems -> {name: n values}; texts become one, with spaces."""
    lists = {name: [each[name] for each in scores] for name in scores[0]}
    return {name: " ".join(values) if isinstance(values[0], str) else values
            for name, values in lists.items()}


def chosen_samples(episodes):
    """The episodes to show: the first few, or of those that lead on one of each end."""
    if episodes[0].problem.leads_on:
        return list({episode.solved(): episode for episode in reversed(episodes)}.values())
    return episodes[:SAMPLES]


def show_episode(row: str, episode: Episode) -> dict:
    """An Episode as plain data for samples/ and the report, its figures as PNG in base64."""
    figures = {}
    for name, figure in episode.problem.figures(episode.turns).items():
        side = None if name == "picture" else 340
        figures[name] = [_png(each, side) for each in figure] if name == "pictures" else _png(figure, side)
    return {"row": row, "prompt": episode.problem.prompt, "turns": episode.turns,
            "reward": episode.total()} | figures


def _png(image, side=None):
    """In base64; with a `side`, of at most side x side pixels and 64 colours, not dithered: a few
    kilobytes."""
    if side:
        image = image.convert("RGB")
        image.thumbnail((side, side))
        image = image.quantize(64, dither=0)
    image.save(file := io.BytesIO(), "PNG", optimize=side is not None)
    return base64.b64encode(file.getvalue()).decode()


def limit_pictures(samples, limit=10**6):
    """The samples, but the pictures along an episode only where all figures up to there have at
    most `limit` characters; maps and single pictures stay."""
    size = sum(len(sample.get("map", "")) for sample in samples)
    for sample in samples:
        size += sum(map(len, sample.get("pictures", ())))
        if size > limit:
            sample.pop("pictures", None)
    return samples


def truncated(episodes: list, tokenizer) -> float:
    """Share of episodes whose last answer was cut off before its stop token."""
    return sum(e.ids[-1] not in tokenizer.stop_ids for e in episodes) / len(episodes)


def default_max_new_tokens(tokenizer) -> int:
    """Tokens that an answer may have by default: the tiny model's are short."""
    return 64 if tokenizer.short else 256


def pass_at_1_to_k(model, tokenizer, settings: EvalSettings, k: int) -> dict:
    """pass@1 .. pass@k at temperature 1 for every row: {row: [pass@1, ..., pass@k]}."""
    result = {}
    for row in legible_rows(model, settings):
        problems = suite_problems(model, tokenizer, settings, row)
        solved = [e.solved() for e in play(model, tokenizer, problems, k, settings, 1.0)]
        right = np.reshape(solved, (len(problems), k)).sum(1).tolist()
        result[row.name] = [float(np.mean([pass_at_k(k, c, j) for c in right]))
                            for j in range(1, k + 1)]
    return result


def summary(result: dict) -> dict:
    """{"row/mode/score": share} of an evaluation, for the metrics file."""
    titles = tasks.task_of(result["suite"]).problem.SCORES
    return {f"{row}/{mode}/{score}": round(sum(values) / len(values), 4)
            for row, modes in result["rows"].items() for mode, scores in modes.items()
            for score, values in scores.items() if score in titles}


# ---- 4. Runs and models --------------------------------------------------------------------------


def find_model(name: str, task: str) -> Path:
    """The model directory that a name means: `tiny` (the shipped base of the task), a run directory
    (its latest checkpoint), or a model directory itself. ValueError when there is none."""
    path = Path(name)
    if name == "tiny":
        path = Path(__file__).parent / "assets" / f"tiny-{task}"
        if not path.is_dir():
            raise ValueError(f"no tiny base is shipped for {task} (looked for {path}).")
        return path
    if (path / "latest").is_file():
        return latest_checkpoint(path)
    if not path.is_dir():
        raise ValueError(f"{name} is not a directory; give `tiny`, a run directory or a model "
                         "directory.")
    if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"{name} holds neither a run with a checkpoint (file `latest`) nor a model "
                         "(config.json).")
    return path


def latest_checkpoint(run) -> Path:
    """The checkpoint directory that the run's pointer file names. ValueError when it names none."""
    name = (Path(run) / "latest").read_bytes()[:100].decode("utf-8", "replace").strip()
    if not re.fullmatch(r"step-\d{6,9}", name) or not (Path(run) / name).is_dir():
        raise ValueError(f"{run}/latest does not name a checkpoint of this run; give one of its "
                         "step-NNNNNN directories.")
    return Path(run) / name


def device_and_dtype(device: str) -> tuple:
    """("cuda", bfloat16) or ("cpu", float32); `auto` takes the GPU when there is one."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ValueError("--device must be auto, cpu or cuda (or cuda:1 and so on).")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    if device.startswith("cuda") and int(device[5:] or 0) >= count:
        raise ValueError(f"--device {device}: there is no such GPU; torch sees {count}.")
    return device, torch.bfloat16 if device.startswith("cuda") else torch.float32


UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
                    "\ud800-\udfff\ufffe\uffff]")


def clean(text) -> str:
    """Text without characters that steer a terminal, flip the reading direction or are not legal
    in XML. Line breaks and tabs stay."""
    return UNSAFE.sub("", str(text))


def esc(text) -> str:
    """`clean`, then escaped for HTML and XML, attributes included."""
    return html.escape(clean(text), quote=True)


class _Help(argparse.HelpFormatter):
    """Shows each default once, and none where it says nothing or the text says it."""

    def _get_help_string(self, action):
        silent = (None, False, argparse.SUPPRESS)
        if "default" in action.help or any(action.default is value for value in silent):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors of one sentence."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        raise ValueError(re.sub(r"argument (\S+): (.* must lie)", r"\1 \2", message)
                         + "; --help lists the flags.")

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        for name, value in vars(args).items():
            if value == "" or isinstance(value, str) and UNSAFE.search(value):
                raise ValueError(f"--{name.replace('_', '-')} is empty or holds characters that no "
                                 "name or text has.")
        return args


def between(kind, low: float, high: float):
    """For `add_argument(type=...)`: a number of this kind (int or float) from low to high. NaN is
    in no range."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:20]} must lie from {low:g} to {high:g}")
        return value
    number.__name__ = kind.__name__  # argparse's own error names it
    return number


def run_main(main) -> None:
    """Run a script's main: an expected error is one sentence on stderr and exit status 2."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if isinstance(error, RuntimeError) and not out_of_memory:
            out_of_memory = "allocate" in str(error)
            if not out_of_memory:
                raise
        if out_of_memory:
            error = ("out of memory; lower --micro-batch, --rollout-batch or --max-new-tokens, or "
                     "give --recompute. Checkpoints are as they were.")
        elif isinstance(error, OSError):
            error = (f"{error.filename or 'a file'} could not be read or written: "
                     f"{error.strerror}. What was there is as it was.")
        print(f"error: {' '.join(clean(error).split())}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- 4. Intervals
# A *row* is a way to score (id, rule, fake); a *view* is (decoding, part), such as ("greedy", "first"); S seeds, n problems,
# C classes (problems with the same numbers), P points of a curve. Success is a share in 0..1, printed in %.

MODES = {"greedy": "greedy", "sampled": "temperature 1"}
PARTS = {"first": "first attempt", "episode": "whole episode"}
STEPS = {"steps_first": "per step, until the first failure", "steps": "per step, until the attempts ran out",
         "forced": "per step, teacher-forced"}  # of walks, in words of `scores_per_step`

def problem_class(suite):
    """The class of a suite's problems; tasks.Problem for a suite that is not known here."""
    known = isinstance(suite, str) and suite in tasks.suite_names()
    return tasks.task_of(suite).problem if known else tasks.Problem


def shows_pictures(suite):
    return suite in tasks.suite_names() and tasks.task_of(suite).pictures


def words_for(suite):
    return problem_class(suite).WORDS._asdict()


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
    n, e["solved"], walk = len(e["classes"]), {}, problem_class(e.get("suite")).leads_on
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
    return ROWS | {row: ROWS.get(row, row) for row in any_eval(study)["rows"] if problem_class(suite).leads_on}


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
    if problem_class(suite).leads_on:
        return step_tables(study, view)
    tables = look_tables(study, view, measures) if shows_pictures(suite) else {}
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
    if not problem_class(any_eval(study).get("suite")).leads_on:
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
    if not {"sft end", "rl end"} <= stage.keys() or not shows_pictures(last.get("suite")):
        return []
    sft, rl = (stage[key][1] for key in ("sft end", "rl end"))
    rows = [row for row in last["rows"] if row not in (*ROWS, SHUFFLED, "text") and has(sft, row, view) and has(rl, row, view)]
    sign = {row: sign_of(paired(_solved(rl, row, view), _solved(sft, row, view), last["classes"])) for row in rows}
    by_sign = {s: ", ".join(row for row in rows if sign[row] == s) for s in (1, -1, 0)}
    out = [f"Under other looks RL ends {word} SFT: {by_sign[s]}." for s, word in ((1, "clearly above"), (-1, "clearly below")) if by_sign[s]]
    out += [f"These looks do not separate the arms: {by_sign[0]}."] if by_sign[0] else []
    whole = (lambda read: read) if problem_class(last["suite"]).leads_on else (lambda read: read == 1)
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


def _turn(problem, turn, views):
    """An answer and its verdict; of a walk also its position, what the answer says, and, once, the view there, from `views`."""
    told = f"verifier: {esc(turn.get('outcome', ''))}, reward {esc(turn.get('reward', ''))}. {esc(turn.get('feedback') or '')}"
    told = f"<pre class=answer>{esc(turn['response'])}</pre><p class=small>{told}</p>"
    if "position" not in turn:
        return told
    parts = [f"{label} <b>{esc(text)}</b>" for label, text in problem.parsed(str(turn["response"]))]
    view = _picture(views.pop(turn["position"]), "cards", "the view from there") if turn["position"] in views else ""
    return f"<div class=step>{view}<div><b>position {turn['position'] + 1}</b>: {' / '.join(parts)}{told}</div></div>"


def _episodes(study, arm, most=3):
    """Up to `most` ID and rule OOD episodes of the arm's latest evaluation that has samples, one of other rows; all walks."""
    e = next((e for e in reversed(study[arm][min(study[arm])]) if e["samples"]), {"samples": [], "rows": ()})
    out, few = [], lambda row: most if row in ROWS or problem_class(e["suite"]).leads_on else 1
    for sample in (s for row in e["rows"] for s in [s for s in e["samples"] if s["row"] == row][: few(row)]):
        out.append(f"<h3>{esc(ROWS.get(sample['row'], sample['row']))}, return {esc(sample['reward'])}</h3>")
        out += [_picture(sample["picture"], "cards", "what the model saw")] if "picture" in sample else []
        asked, views = f"<pre>{esc(sample['prompt'])}</pre>", dict(enumerate(sample.get("pictures", ())))
        turns = "".join(_turn(problem_class(e["suite"]), turn, views) for turn in sample["turns"])
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


def result_table(result):
    """Success of one evaluation with intervals, as markdown; of walks also per step, and below it where they fail."""
    walk, lines = problem_class(result["suite"]).leads_on, []
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


# ---- 10. Command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line of evaluation."""
    suites = ", ".join(tasks.suite_names())
    parser = Parser("Evaluate a model on held-out problems, or write the report of a study.")
    add = parser.add_argument
    add("model", nargs="?", help="tiny (the shipped base), a run directory or a model directory")
    add("--report", metavar="STUDY", help="print a study's tables and write its report.html")
    add("--compare", metavar=("A", "B"), nargs=2, help="evaluate two models on the same problems, "
        "with paired differences")
    add("--choose", metavar="GRID", help="print a grid's ID validation scores and the learning "
        "rates to take")
    add("--suite", default="gp-l", help=f"one of {suites}")
    add("--n", type=between(int, 1, 1e5), default=500, help="held-out problems per row")
    add("--attempts", type=between(int, 1, 100), default=1, help="answers per question")
    add("--split", choices=("val", "test"), default="test", help="val chooses settings, test is for "
        "claims")
    add("--k", type=between(int, 0, 1000), default=0, help="also sample K answers per problem and "
        "print pass@1 .. pass@K")
    add("--max-new-tokens", type=between(int, 1, 1e5), help="tokens per answer (default: 64 tiny, "
        "256 else)")
    add("--rollout-batch", type=between(int, 1, 1e6), default=256, help="episodes side by side")
    add("--out", help="run directory to put evals/000000.json into, for a report")
    add("--ask", metavar="TEXT", help="print the model's likeliest answer to this, nothing else")
    add("--image", metavar="FILE", help="a picture that goes with --ask")
    add("--export", metavar="DIR", help="write the model there as the hub has it, adapters merged, "
        "in bfloat16")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.model, args.report, args.choose, args.compare))) != 1:
        raise ValueError("give one of: a model to evaluate, --compare and two models, --report and "
                         "a study directory, --choose and a grid of runs.")
    if args.suite not in tasks.suite_names():
        raise ValueError(f"--suite must be one of {suites}.")
    out = Path(args.out or "")
    if args.out and (out.is_file() or (out / "args.json").exists()
                     or (out / "evals/000000.json").exists()):
        raise ValueError(f"{args.out} holds a run or an evaluation already; choose another --out.")
    if args.image and not args.ask:
        raise ValueError("--image goes with --ask: give a question about the picture.")
    return args


@torch.no_grad()
def ask(model, tokenizer, text, image, max_new_tokens):
    """Greedy answer to one question about a picture (a path or None). ValueError for a picture that
    cannot be read."""
    images = None
    if image:
        tiles = pack_images([[open_image(image)]], model.config.vision.image_size)
        images = model.encode_images(*tiles)
    prompt = tokenizer.prompt(text, image=bool(image))
    ids, lengths = pad_rows([prompt], tokenizer.pad, model.device)
    cache = Cache(model, 1, ids.shape[1] + max_new_tokens, images)
    logits = model.extend(cache, ids, lengths)
    sampling = Sampling(max_new_tokens, temperature=0.0)
    (answer,), _ = generate(model, cache, logits, sampling, tokenizer.stop_ids)
    return tokenizer.decode(answer)


def write_study(directory):
    """Print the tables of a study and write its report and the figures as files for a README."""
    study = load_study(directory)
    print(table_text(study))
    for name, svg in (("curves", svg_curves(study)), ("path", svg_path(study))):
        page = svg_standalone(svg)
        write_atomically(Path(directory) / f"{name}.svg", lambda p: p.write_text(page, "utf-8"))
    print(f"report: {write_report(directory)}")
    return study


def load(name, args):
    """(model, tokenizer, EvalSettings) of a name on the command line and the flags."""
    directory = find_model(name, args.suite.removesuffix("-probes"))
    device, dtype = device_and_dtype(args.device)
    model, tokenizer = load_model(directory, dtype, device)
    max_new_tokens = args.max_new_tokens or default_max_new_tokens(tokenizer)
    return model, tokenizer, EvalSettings(args.suite, args.n, args.attempts, args.split,
                                          max_new_tokens, args.rollout_batch)


def compare(args):
    """Evaluate two models, one after the other in memory, and print their table. -> evaluations"""
    results = [evaluate(*load(name, args)) for name in args.compare]
    print(f"{args.suite}, {args.n} {args.split} problems, success of whole episodes in % "
          "[95 % interval]")
    print(compare_table(results, args.compare))
    return results


def report_result(model, tokenizer, settings, args):
    """Evaluate a model, print its tables, and write the evaluation where --out says. -> it"""
    result = evaluate(model, tokenizer, settings)
    print(f"{clean(args.model)} on {args.suite}, {args.n} {args.split} problems, success in % "
          "[95 % interval]")
    names = [row.name for row in tasks.suite_rows(args.suite) if row.name not in result["rows"]]
    if names:
        print(f"left out, since tiles of {model.config.vision.image_size} pixels are too small to "
              f"show it: {', '.join(names)}")
    print(result_table(result))
    if args.k:
        result["pass_at_k"] = pass_at_1_to_k(model, tokenizer, settings, args.k)
        head = ["row", *(f"pass@{j}" for j in range(1, args.k + 1))]
        lines = [[name, *(f"{100 * share:.1f}" for share in shares)]
                 for name, shares in result["pass_at_k"].items()]
        print("\n" + _markdown(head, lines))
    if args.out:
        (Path(args.out) / "evals").mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out) / "evals" / "000000.json",
                   result | {"step": 0, "flops": 0, "seconds": 0.0})
    return result


def main(argv=None):
    """Evaluate or report; returns the evaluation, or the study."""
    args = parse_args(argv)
    if args.report:
        return write_study(args.report)
    if args.choose:
        return choose_rates(args.choose)
    if args.compare:
        return compare(args)
    model, tokenizer, settings = load(args.model, args)
    if args.export:
        save_model(model, tokenizer, args.export, torch.bfloat16)
        print(f"written: {clean(args.export)}")
    elif args.ask:
        print(clean(ask(model, tokenizer, args.ask, args.image, settings.max_new_tokens)))
    else:
        return report_result(model, tokenizer, settings, args)
    return {}


if __name__ == "__main__":
    run_main(main)
