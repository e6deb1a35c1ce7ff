"""Rollouts, the ID/OOD suites, intervals, tables, plots and the report.

  1. Episodes and rollout (one growing list of token ids), up to here the reading path
  2. Encoded pictures, 3. Evaluation (the same held-out problems under every rule)
  4. Runs and models, 5. Intervals, 6. A study (the evaluations of all arms and seeds)
  7. Tables, 8. Command line; figures and the report's page are made by assets/report.py
Shapes: P problems, G episodes of one problem (a group), B = P * G episodes, T tokens.
"""
import argparse
import base64
import copy
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is loaded ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch
import torch.distributed as dist

import tasks
from model import (GRAPHS, Cache, ImageContext, Sampling, finite, generate, load_model, open_image,
                   pack_images, pad_rows, read_json, remedy, save_model, write_json)

# ---- 1. Episodes and rollout ---------------------------------------------------------------------

@dataclass
class Episode:
    """One problem answered by the policy: token ids that only ever grow, and what each one is."""
    problem: tasks.Problem
    ids: list = field(default_factory=list)  # everything that the model reads
    response_mask: list = field(default_factory=list)  # 1: sampled by the policy (stop tokens too)
    log_probs: list = field(default_factory=list)  # of the policy that sampled; 0.0 at mask 0
    turns: list = field(default_factory=list)  # a dict for each answer: the text and its verdict
    pictures: list = field(default_factory=list)  # one for each <|image|> among the ids
    encoded: list = field(default_factory=list)  # the pictures as the rollout encoded them
    moved: float | None = None  # of `Run.moved`, in evaluations

    @classmethod
    def start(cls, problem: tasks.Problem, tokenizer) -> "Episode":
        """An episode with the problem's prompt, and its picture if it has one."""
        episode = cls(problem, pictures=[] if problem.image is None else [problem.image])
        episode.append_context(tokenizer.prompt(problem.prompt, image=bool(episode.pictures)))
        return episode

    @classmethod
    def demonstrated(cls, problem: tasks.Problem, tokenizer, responses: list) -> "Episode":
        """A demonstrator's responses, with the verifier's words between them. The problem has to
        allow as many attempts as there are responses to one question: at most two."""
        episode = cls.start(problem, tokenizer)
        for i, response in enumerate(responses, 1):
            episode.append_response(tokenizer.encode(response) + [tokenizer.eot])
            if i < len(responses):
                episode.verify(tokenizer, response)
        return episode

    def copy(self) -> "Episode":
        """Another episode of the group, which goes on by itself. Pictures stay the same objects."""
        problem, *lists, moved = vars(self).values()
        return Episode(copy.copy(problem), *([*values] for values in lists), moved)

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
        if not step.done and self.ids[-1] not in tokenizer.stop_ids:  # cut off at max_new_tokens
            self.append_context([tokenizer.eot])  # not sampled, so not in the mask
        return self.append_feedback(tokenizer, step)

    def record(self, problem: tasks.Problem, text: str) -> tasks.Step:
        """Let a problem judge a response, and write the verdict down in `turns`."""
        place = {"position": problem.position} if problem.leads_on else {}
        step = problem.step(text)
        self.turns.append({"response": text, "outcome": step.outcome, "reward": step.reward,
                           "feedback": step.feedback, "read": step.read} | place)
        return step

    def append_feedback(self, tokenizer, step: tasks.Step) -> bool:
        """Append the verifier's text; after a right action, behind the next picture. -> done"""
        walked = step.outcome == "right_action" and self.problem.image is not None
        if not step.done:
            self.pictures += [self.problem.image] if walked else []
            self.append_context(tokenizer.turn(step.feedback, image=walked))
        return step.done

    def replace_by_expert(self, tokenizer, text: str) -> bool:
        """Judge the response just appended, then put the expert's in its place. -> done"""
        self.record(copy.copy(self.problem), text)
        while self.response_mask[-1]:
            del self.ids[-1], self.response_mask[-1], self.log_probs[-1]
        expert, step = self.problem.advance()
        self.append_context([*tokenizer.encode(expert), tokenizer.eot])
        return self.append_feedback(tokenizer, step)

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
    """Play `group` episodes of every problem with the verifier in the loop: P lists of G Episodes.

    problems: P fresh ones, which stay unused. sampling.batch: episodes computed side by side, at
    least one group, with one KV cache for all turns. forced: each answer follows the expert's
    earlier ones (teacher forcing)."""
    parts = pieces(problems, sampling.batch // group)
    if len(parts) > 1:
        return [members for part in parts
                for members in rollout(model, tokenizer, part, group, sampling, forced)]
    # 1. Read every prompt once. Its group goes on from there.
    started = [Episode.start(copy.copy(problem), tokenizer) for problem in problems]
    images = encode_new_pictures(model, started, known := {})  # known: those that are encoded
    ids, lengths = pad_rows([episode.ids for episode in started], tokenizer.pad, model.device)
    room = ids.shape[1] + (0 if group > 1 else sampling.max_new_tokens)  # a group's is made later
    cache = Cache(model, len(problems), room, images)
    logits = model.extend(cache, ids, lengths).repeat_interleave(group, 0)
    if group > 1:
        cache.select(torch.arange(len(problems), device=model.device).repeat_interleave(group))
    groups = [[episode.copy() for _ in range(group)] for episode in started]
    playing = [episode for members in groups for episode in members]
    while True:
        # 2. Sample a response for each episode.
        length = cache.length.clone()
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
            cache.keep_latest_image()  # no token to come looks at an earlier one


def pieces(items: list, size: int) -> list:
    """The items in lists of `size`, at least 1; the last one may be shorter."""
    return [items[i : i + max(1, size)] for i in range(0, len(items), max(1, size))]


def micro_batches(episodes: list, size: int, tokens: int = 1 << 60) -> list:
    """Lists of at most `size` episodes and `tokens` tokens (one episode may have more); any sizes
    give the same gradients. The episodes of a prompt, computed once, stay together."""
    batches = []
    groups = [sorted(group, key=lambda e: len(e.ids)) for group in by_prompt(episodes)]
    for group in sorted(groups, key=lambda group: len(group[-1].ids)):
        prompt = group[0].response_mask.index(1)
        rest = len(group[-1].ids) - prompt  # computed for each row, the prompt once for all
        for piece in pieces(group, min(size, (tokens - prompt) // rest)):
            used = prompt + len(piece) * rest
            if not batches or len(batches[-1]) + len(piece) > size or total + used > tokens:
                batches.append([])
                total = 0
            batches[-1] += piece
            total += used
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


def prompt_of(episode: Episode) -> tuple:
    """What the episodes of a group have in common: the ids of the prompt, and its picture."""
    return tuple(episode.ids[: episode.response_mask.index(1)]), *map(id, episode.pictures[:1])


def by_prompt(episodes: list) -> list:
    """Lists of the episodes that have the same prompt."""
    groups = {}
    for episode in episodes:
        groups.setdefault(prompt_of(episode), []).append(episode)
    return list(groups.values())


class EncodedPicture(NamedTuple):
    """A picture as the decoder sees it: a slice of the ImageContext that it was encoded in."""
    features: torch.Tensor  # (M * P, D)
    tiles: torch.Tensor  # (1, M) bool: those that exist
    prefix_looks: bool


def encode_pictures(model, pictures: list, known: dict | None = None) -> list:
    """An EncodedPicture for each of the pictures, in their order.

    known: {id of a picture: EncodedPicture} of earlier calls. New pictures are encoded side by
    side, each once, and added to it. The caller keeps the pictures alive: no id comes twice.
    """
    known = {} if known is None else known
    new = {id(picture): [picture] for picture in pictures if id(picture) not in known}
    if new:
        packed = pack_images([*new.values()], model.config.vision.image_size)
        context = model.encode_images(*packed)
        for key, features, tiles in zip(new, context.features, context.tiles):
            known[key] = EncodedPicture(features, tiles, context.prefix_looks)
    return [known[id(picture)] for picture in pictures]


def encode_new_pictures(model, episodes: list, known: dict) -> ImageContext | None:
    """The pictures that episodes of a rollout were shown since the last call, None without any.

    known: as in `encode_pictures`. ValueError for a second picture where tokens before the first
    one attend to all pictures: it was not there when they were computed.
    """
    new = [episode.pictures[len(episode.encoded) :] for episode in episodes]
    later = any(episode.encoded and pictures for episode, pictures in zip(episodes, new))
    if later and not model.config.mask_prefix_attention:
        raise ValueError("a model whose first tokens look at all pictures cannot be shown one "
                         "after the other: set mask_prefix_attention to true in its config.json, "
                         "as Meta's code has it.")
    encode_pictures(model, [*chain(*new)], known)  # side by side
    rows = [encode_pictures(model, pictures, known) for pictures in new]
    for episode, row in zip(episodes, rows):
        episode.encoded += row
    return merge_contexts(rows)


def merge_contexts(rows: list) -> ImageContext | None:
    """One ImageContext for rows of text: for each the list of its EncodedPictures, in the order of
    its <|image|> tokens. Rows with equal lists share a set. None without any picture."""
    # The episodes of a group hold the same EncodedPictures, so their ids say what is shared.
    keys = [tuple(map(id, row)) for row in rows]
    sets = dict(zip(keys, rows))
    if not any(sets):
        return None
    some = next(chain(*rows))

    def padded(part):  # a set without pictures is a part of length 0, padded like any shorter one
        none = getattr(some, part)[:0]
        parts = [torch.cat([none, *(getattr(picture, part) for picture in row)])
                 for row in sets.values()]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    set_of_row = torch.tensor([*map([*sets].index, keys)], device=some.tiles.device)
    return ImageContext(padded("features"), padded("tiles"), set_of_row, some.prefix_looks)


def images_for(model, episodes: list) -> ImageContext | None:
    """The ImageContext for a training pass over episodes, in their order; None for text.

    While tower or projector are trained the pictures are encoded here, with gradient; else the
    rollout's encoding is used again. The episodes of a group have the same first pictures, so the
    longest list serves them all, and a mask hides the rest: B x T x (tokens of a set) entries.
    """
    fullest = [max(group, key=lambda e: len(e.pictures)) for group in by_prompt(episodes)]
    rows, known = [episode.encoded for episode in fullest], {}
    if model.trains_vision or any(e.pictures and not e.encoded for e in episodes):
        with torch.set_grad_enabled(model.trains_vision and torch.is_grad_enabled()):
            encode_pictures(model, [picture for e in fullest for picture in e.pictures], known)
        rows = [encode_pictures(model, episode.pictures, known) for episode in fullest]
    encoded = dict(zip(map(prompt_of, fullest), rows))
    return merge_contexts([encoded[prompt_of(episode)] for episode in episodes])


# ---- 3. Evaluation -------------------------------------------------------------------------------

ROWS = {"id": "ID", "rule": "rule OOD", "fake": "fake rule"}  # of every suite: name and title
SHUFFLED = "shuffled"  # the control: a model that reads the cards fails here, a guesser does not
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated, and how."""
    suite: str  # a task's name, or with "-probes" its further rows
    n: int  # held-out problems per row
    attempts: int = 1  # answers per question
    split: str = "test"
    max_new_tokens: int = 64  # per answer
    batch: int = 256  # episodes computed side by side
    rows: tuple | None = None  # only these rows of the suite
    teacher: str | None = None  # the demonstrator whose answers are scored
    rule: str | None = None  # that was trained, as the row "id" has it; None: the task's own
    visual: str | None = None  # the look that was trained


def evaluate(model, tokenizer, settings: EvalSettings, moved=None) -> dict:
    """How a model does on the rows of a suite, as plain data for JSON.

    rows[row][mode][score] is a list of n numbers, a score of the task's SCORES; the mode "greedy"
    is temperature 0, "sampled" temperature 1. All rows have the same n held-out problems where
    their rules allow it. A row with `judged_by` ("fake rule") judges the answers of the row with
    the same prompt once more, by the other rule. Where problems lead on it is played anew, since
    the verifier decides which question is next.

    nats["teacher"][row] is -log p of each answer of settings.teacher, nats["moved"][row] what the
    function `moved` says of the sampled episodes, see `Run.moved`; of the rows "id" and "rule".
    """
    began, turns, truncations, samples = time.time(), {}, [], []
    classes, scores, nats, different = {}, {}, {}, []
    task = tasks.task_of(settings.suite)
    for row in legible_rows(model, settings):
        problems = suite_problems(model, tokenizer, settings, row)
        different.append(len({(each.cls, each.prompt, each.expert()) for each in problems}))
        leads_on, scored = problems[0].leads_on, row.name in ("id", "rule")
        classes[row.name], scores[row.name] = [problem.cls for problem in problems], {}
        if settings.teacher and scored:
            distances, _ = teacher_nats(model, tokenizer, settings, row)
            nats.setdefault("teacher", {})[row.name] = distances
        for mode in TEMPERATURES:
            prompts, forced = (row.rule, row.visual, mode), [None] * len(problems)
            # 1. Answers: those of the row with the same prompts, or new ones.
            if row.judged_by and prompts in turns and not leads_on:
                answers = [*map(judge_again, problems, turns[prompts])]
            else:
                episodes = play(model, tokenizer, problems, settings, mode, moved=(
                    moved if mode == "sampled" and scored else None))
                answers = [episode.turns for episode in episodes]
                if episodes[0].moved is not None:
                    nats.setdefault("moved", {})[row.name] = [each.moved for each in episodes]
                turns.setdefault(prompts, answers)  # "shuffled" has the prompts of "id"
                truncations.append(truncated(episodes, tokenizer))
                if mode == "greedy":
                    samples += [show_episode(row.name, e) for e in worth_showing(episodes)]
            # 2. The same positions after a right history, where there are several.
            if leads_on:
                forced = [twin.turns for twin in
                          play(model, tokenizer, problems, settings, mode, forced=True)]
            # 3. A number for each problem and score.
            scores[row.name][mode] = as_lists(
                [problem.scores(*played) for problem, *played in zip(problems, answers, forced)])
    GRAPHS.pop(model, None)  # training would go without what it holds
    return {
        "suite": settings.suite, "split": settings.split,
        "n": settings.n, "attempts": settings.attempts,
        "rule": settings.rule if settings.rule != task.rule else None,
        "visual": settings.visual if settings.visual != task.visual else None,
        "classes": any_of(classes),
        "row_classes": classes,
        "different": max(different),  # problems; of some tasks there are not many
        "truncated": max(truncations),
        "rows": scores,
        "samples": limit_pictures(samples),
        "nats": nats,
        "eval_seconds": round(time.time() - began, 2),
    }


def legible_rows(model, settings):
    """The rows of the suite, or those asked for, whose pictures this model's tiles can show."""
    problem, tile = tasks.task_of(settings.suite).problem, model.config.vision.image_size
    return [row for row in rows_of(settings.suite, settings.rule, settings.visual)
            if problem.legible(row, tile) and row.name in (settings.rows or [row.name])]


def rows_of(suite: str, rule: str | None, visual: str | None) -> list[tasks.Row]:
    """The rows of a suite for a model that was trained on a rule and a look (None: the task's own).

    Row "id" has both. The others change them as the table's rows change the task's own: where
    "7/target=36" was trained "11,12,13" becomes "11,12,13/target=36", and where "11,12,13" was
    trained it becomes "10". A change that was trained itself makes no row."""
    task = tasks.task_of(suite)
    first = task.suite[0]

    def now(row):
        return tasks.Row(row.name, changed(row.rule, task.rule, rule),
                         changed(row.judged_by, task.rule, rule),
                         changed(row.visual or task.visual, task.visual, visual))
    return [now(row) for row in tasks.suite_rows(suite)
            if (row[1:] == first[1:]) == (now(row)[1:] == now(first)[1:])]


def changed(text, own, trained):
    """The change that `text` makes to a task's own rule or look, made to the trained one: texts
    such as "10" and "red/style=dark"."""
    if not (text and trained):
        return text
    (head, *options), (now, *kept) = text.split("/"), trained.split("/")
    options = {each.partition("=")[0]: each for each in kept + options}
    return "/".join([{own: now, now: own}.get(head, head), *options.values()])


def suite_problems(model, tokenizer, settings, row):
    """The n problems of one row of a suite, as they are put to this model."""
    name, style = settings.suite.removesuffix("-probes"), prompt_style(model, tokenizer)
    problems = [tasks.make(name, row.rule, row.visual, settings.split, i, settings.attempts,
                           judged_by=row.judged_by, **style) for i in range(settings.n)]
    if row.name == SHUFFLED:
        pictures = [problem.image for problem in problems]
        for problem, picture in zip(problems, pictures[1:] + pictures):
            problem.image = picture
    return problems


def prompt_style(model, tokenizer) -> dict:
    """How problems are put to a model, as arguments of tasks.make: the tiny tokenizer gets short
    prompts, and pictures are made for the model's tiles."""
    return {"style": "short" if tokenizer.short else "full", "tile": model.config.vision.image_size}


def judge_again(problem, turns):
    """The turns of an episode with the outcomes that another problem's verifier gives."""
    return [turn | {"outcome": copy.copy(problem).step(turn["response"]).outcome} for turn in turns]


def play(model, tokenizer, problems, settings, mode, group=1, forced=False, moved=None):
    """A list of the episodes of all problems, group by group; moved: as in `evaluate`.

    Every call has a random stream of its own, so that a row's answers do not depend on the rows
    before it, and training goes on as if there had been no evaluation. The encoded pictures of a
    batch are dropped before the next one, and so are the pictures where they are large: a walk has
    a megabyte or more at every position.

    Under torchrun each process plays its share, and all get what `evaluate` needs of each episode.
    Greedy answers are those of one process; the others are drawn from a stream for each process.
    """
    rank, number = processes()
    generator, episodes = torch.Generator(model.device).manual_seed(rank), []
    mine, said = problems[rank::number], time.time()
    count, batch = len(mine) * group, eval_batch(settings.suite, settings.batch, tokenizer)
    sampling = Sampling(settings.max_new_tokens, TEMPERATURES[mode], generator, batch)
    for part in pieces(mine, batch // group):
        groups = rollout(model, tokenizer, part, group, sampling, forced=forced)
        part = [*chain(*groups)]
        for episode, value in zip(part, moved(part) if moved else ()):
            episode.moved = value
        for episode in part:
            episode.encoded = []
            if model.config.vision.image_size > 100:
                episode.pictures = []
                episode.problem.forget_pictures()
            episodes.append(episode)
        if time.time() - said > 5 and len(episodes) < count:
            said = time.time()
            print(f"  {len(episodes):,} of {count:,} episodes", file=sys.stderr, flush=True)
    if number == 1:
        return episodes
    found = gathered(pieces([(e.turns, e.moved, e.ids[-1:]) for e in episodes], group))
    return [Episode(problem, ids, turns=turns, moved=moved)
            for problem, members in zip(problems, found) for turns, moved, ids in members]


def eval_batch(suite: str, batch: int, tokenizer) -> int:
    """Episodes side by side in an evaluation, `batch` or less: of a full-size model at most 64
    where each has a picture of its own, which takes 0.4 GB there."""
    many = tasks.task_of(suite).pictures and not tokenizer.short
    return min(batch, 64) if many else batch


def as_lists(scores):
    """[{name: value}, ...] of n problems -> {name: n values}; words are joined by spaces."""
    lists = {name: [each[name] for each in scores] for name in scores[0]}
    return {name: " ".join(values) if isinstance(values[0], str) else values
            for name, values in lists.items()}


def worth_showing(episodes):
    """Four episodes; where problems lead on, one that solved its problem and one that did not."""
    if episodes[0].problem.leads_on:
        return {episode.solved(): episode for episode in reversed(episodes)}.values()
    return episodes[:4]


def show_episode(row: str, episode: Episode) -> dict:
    """An Episode as plain data for samples/ and the report, its figures as PNG in base64."""
    shown = {"row": row, "prompt": episode.problem.prompt, "turns": episode.turns,
             "reward": episode.total()}
    for name, figure in episode.problem.figures(episode.turns).items():
        shown[name] = ([_png(view, small=True) for view in figure] if name == "pictures" else
                       _png(figure, small=name == "map"))
    return shown


def _png(image, small):
    """In base64; small: of at most 340 x 340 pixels and 64 colours, which is a few kilobytes."""
    if small:
        image = image.convert("RGB")
        image.thumbnail((340, 340))
        image = image.quantize(64, dither=0)
    image.save(file := io.BytesIO(), "PNG", optimize=small)
    return base64.b64encode(file.getvalue()).decode()


def limit_pictures(samples, limit=10**6):
    """The samples, without the pictures along the way where all figures up to there have more than
    `limit` characters. Maps and single pictures stay."""
    size = sum(len(sample.get("map", "")) for sample in samples)
    for sample in samples:
        size += sum(map(len, sample.get("pictures", ())))
        if size > limit:
            sample.pop("pictures", None)
    return samples


def truncated(episodes: list, tokenizer) -> float:
    """Share of episodes whose last answer was cut off before its stop token."""
    return sum(e.ids[-1] not in tokenizer.stop_ids for e in episodes) / len(episodes)


def teacher_nats(model, tokenizer, settings: EvalSettings, row: tasks.Row) -> tuple:
    """(-log p of the answers of the demonstrator settings.teacher in nats, their tokens), a list of
    both with a number for each of the row's problems. An answer of many nats is foreign to the
    model: it would hardly write it by itself."""
    two = replace(settings, attempts=max(2, settings.attempts))  # some demonstrators need two
    episodes = [Episode.demonstrated(problem, tokenizer, problem.demonstrate(
        settings.teacher, random.Random(f"teacher/{i}"))[::2])
        for i, problem in enumerate(suite_problems(model, tokenizer, two, row))]
    sums = response_log_probs(model, episodes, tokenizer)
    return [-value for value in sums], [episode.response_tokens for episode in episodes]


@torch.no_grad()
def response_log_probs(model, episodes: list, tokenizer, log_probs=None) -> list[float]:
    """The sum of log p over the response tokens of each episode, in nats: of the model, or those
    of a function (episodes, ids, chosen, images) -> (N,), for which the model encodes pictures."""
    def own(part, ids, chosen, images):
        return model.log_probs(ids, chosen, image=images)

    sums = {}
    for part in micro_batches(episodes, default_micro_batch(tokenizer)):
        batch = to_batch(part, tokenizer.pad, model.device)
        values = (log_probs or own)(part, batch.ids, batch.chosen, images_for(model, part))
        values = finite(values).double()
        of_row = batch.chosen.nonzero()[:, 0]
        rows = values.new_zeros(len(part)).index_add_(0, of_row, values)
        sums |= zip(map(id, part), rows.tolist())
    return [sums[id(episode)] for episode in episodes]


def default_max_new_tokens(tokenizer) -> int:
    """Tokens that an answer may have by default: the tiny model's answers are short."""
    return 64 if tokenizer.short else 256


def default_micro_batch(tokenizer) -> int:
    """Episodes that fit into one pass by default."""
    return 256 if tokenizer.short else 8


def pass_at_1_to_k(model, tokenizer, settings: EvalSettings, k: int) -> dict:
    """{row: [pass@1, ..., pass@k]} of a suite's rows, from k samples of each problem."""
    result = {}
    for row in legible_rows(model, settings):
        problems = suite_problems(model, tokenizer, settings, row)
        episodes = play(model, tokenizer, problems, settings, "sampled", k)
        solved = np.reshape([episode.solved() for episode in episodes], (-1, k)).sum(1)
        result[row.name] = [np.mean([pass_at_k(k, right, j) for right in solved])
                            for j in range(1, k + 1)]
    return result


def summary(result: dict) -> dict:
    """{"row/mode/score": share, "row/nats/teacher": mean} of an evaluation, for the metrics."""
    wanted = {*task_class(result).SCORES, *NATS}
    return {"/".join(name): round(float(values.mean()), 4)
            for name, values in add_scores(result)["scores"].items() if name[-1] in wanted}


# ---- 4. Runs and models --------------------------------------------------------------------------


def find_model(name: str, task: str) -> Path:
    """The model directory that a name means: `tiny` (the shipped base of the task), a run directory
    (its latest checkpoint) or a model directory. ValueError when there is none."""
    path = Path(__file__).parent / "assets" / f"tiny-{task}" if name == "tiny" else Path(name)
    if (path / "latest").is_file() and (path / "args.json").is_file():  # DeepSpeed has a latest too
        return latest_checkpoint(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give `tiny` for a task that has a shipped "
                         "base, a run directory or a model directory.")
    if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"{path} holds neither a run with a checkpoint (file `latest`) nor a "
                         f"model (config.json); {remedy(path, 'config.json')}.")
    return path


def latest_checkpoint(run) -> Path:
    """The checkpoint directory that the run's file `latest` names; ValueError if it names none.
    Says so on stderr when the run is not finished."""
    run = Path(run)
    name = (run / "latest").read_text("utf-8", "replace").strip()
    if not re.fullmatch(r"step-\d{6,9}", name) or not (run / name).is_dir():
        raise ValueError(f"{run}/latest does not name a checkpoint of this run; give one of its "
                         "step-NNNNNN directories.")
    with suppress(Exception):  # there is none yet, or it is damaged
        *_, last = (run / "metrics.jsonl").read_text("utf-8", "replace").splitlines()
        if left := unfinished(read_json(run / "args.json"), json.loads(last)):
            print(clean(f"note: {run} is not finished: {left}."), file=sys.stderr)
    return run / name


def unfinished(args, record) -> str:
    """"" for the last record (metrics or evaluation) of a run that spent its --steps or --flops;
    else how far it is, such as "step 23 of 200"."""
    step, flops = record.get("step", 0), record.get("flops", 0)
    if args.get("flops"):
        share = flops / args["flops"]
        return "" if share >= 1 else f"step {step}, {100 * share:.0f} % of its compute"
    return f"step {step} of {args['steps']}" if step < args.get("steps", 0) else ""


def device_and_dtype(device: str) -> tuple:
    """("cuda", bfloat16) or ("cpu", float32); `auto` takes the GPU when there is one."""
    known = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device == "cpu" or device == "auto" and not known:
        return "cpu", torch.float32
    if not known or device not in ("auto", "cuda", *known):
        raise ValueError(f"--device {device} is not there: give auto, cpu or cuda (or cuda:1 and "
                         f"so on); torch sees {len(known)} GPUs.")
    return device.replace("auto", "cuda"), torch.bfloat16


def processes() -> tuple:
    """(number of this process, number of all) under torchrun; alone (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes() -> None:
    """Meet the processes that torchrun started, if it did. Each takes the GPU of its number."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        gpu = torch.cuda.is_available()
        # Some wait while one plays longer or saves: for a day, not the usual 10 minutes.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo",
                                timeout=48 * dist.default_pg_timeout)
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def gathered(items: list) -> list:
    """The plain data of all processes, of which each has every N-th item, in their order."""
    lists, (rank, number) = [], processes()
    for source in range(number):
        text = json.dumps(items).encode() if source == rank else b""
        size = torch.tensor(len(text))
        dist.broadcast(size, source)
        data = torch.tensor([*text.ljust(size)], dtype=torch.uint8)
        dist.broadcast(data, source)
        lists.append(json.loads(bytes(data.tolist())))
    return [lists[i % number][i // number] for i in range(sum(map(len, lists)))]


UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f"
                    "\ufeff\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]")


def clean(text) -> str:
    """Text without characters that steer a terminal, flip the reading direction or are not legal
    in XML. Line breaks and tabs stay."""
    return UNSAFE.sub("", str(text))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default once, and none that says nothing or that the help text names."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or "default" in action.help
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors of one sentence."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        message = re.sub(r"argument (\S+): (.* must lie)", r"\1 \2", message)
        raise ValueError(f"{message}; --help lists the flags.")

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        for name, value in vars(args).items():
            if value == "" or isinstance(value, str) and UNSAFE.search(value):
                raise ValueError(f"--{name.replace('_', '-')} is empty or holds characters that no "
                                 "name or text has.")
        return args


def between(kind, low: float, high: float):
    """The `type` of a flag that takes a number of this kind (int, float) from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text[:20]} must lie from {low:g} to {high:g}")
        return value
    number.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return number


def number(group, name: str, default: float, low: float, high: float, help: str) -> None:
    """Add a flag for a number from low to high, of the type of its default."""
    kind = between(type(default), low, high)
    group.add_argument(name, type=kind, default=default, help=help)


def run_main(main) -> None:
    """Run a script's main: an expected error is one sentence on stderr and exit status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        if dist.is_initialized():  # a process that ends with its group open can abort
            dist.destroy_process_group()
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        full = re.search("allocate|out of memory", str(error)) and isinstance(error, RuntimeError)
        if full or isinstance(error, MemoryError):
            error = ("out of memory; lower --micro-batch, --rollout-batch or --max-new-tokens, or "
                     "give --recompute. Checkpoints are as they were.")
        elif isinstance(error, RuntimeError):
            raise
        elif isinstance(error, OSError):
            error = (f"{error.filename or 'a file'} could not be read or written: "
                     f"{error.strerror}. What was there is as it was.")
        print(f"error: {' '.join(clean(error).split())}", file=sys.stderr)
        sys.exit(2)


# ---- 5. Intervals --------------------------------------------------------------------------------
# S seeds, n problems, C classes (problems that are nearly the same). Shares are 0..1, printed in %.

UNKNOWN = (math.nan,) * 3  # the interval of a mean of nothing


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t, a fit within 0.1 % for 1 or more degrees of freedom."""
    return 1.96 * np.exp(1.2 / freedom + 0.82 / freedom**2 - 0.15 / freedom**3)


def estimate(values, classes, among=1):
    """(mean, standard error, t, classes with a weight): the interval is mean -+ t errors.

    values: (n,), or (..., S, n) for the same problems under S seeds. classes: n names. among:
    weights of the same shape, whole numbers such as 0 and 1, or one for all. Problems of one class
    are nearly the same, so the error is how far the mean moves when a class is left out (cluster
    jackknife). Where few classes make most of it, it is known badly and t is large (Satterthwaite
    1946). Seeds that differ by more than their luck with single classes add an error of their own,
    with the t of S - 1 degrees of freedom.
    """
    values = np.atleast_2d(values)
    if values.size == 0 or values.shape[-1] != len(classes):
        raise ValueError("An interval needs problems, and a class for each: got "
                         f"{values.shape[-1]} and {len(classes)}.")
    names, member = np.unique(classes, return_inverse=True)
    belongs = np.eye(len(names))[member]  # (n, C)
    among = np.broadcast_to(among, values.shape)
    sums, weights = (values * among) @ belongs, among @ belongs  # (..., S, C)
    count, every = weights.any(-2).sum(-1), weights.sum(-1, keepdims=True)
    means = (sums / every).sum(-1)  # (..., S)
    mean = means.mean(-1)
    # 1. How far the mean of each seed moves without a class; the variance is the sum of squares.
    moves = (sums - mean[..., None, None] * weights) / np.maximum(every - weights, 1)
    squares = moves.mean(-2) ** 2  # (..., C)
    variance = squares.sum(-1)
    # 2. The degrees of freedom of this sum, from the part that each class has in it.
    parts = squares / np.maximum(variance, 1e-30)[..., None]
    t = t_quantile(2 / np.maximum((parts**2).sum(-1) - 1 / count, 2 / np.maximum(count - 1, 1)))
    # 3. The error that the seeds share over all classes, in units of this t.
    seeds = means.shape[-1]
    if seeds > 1:
        own = ((moves - moves.mean(-2, keepdims=True)) ** 2).sum((-2, -1)) / (seeds - 1)
        shared = np.maximum(means.var(-1, ddof=1) - own, 0) / seeds
        variance = variance + shared * (t_quantile(seeds - 1) / t) ** 2
    return mean, np.sqrt(variance), t, count


def interval(values, classes, among=1):
    """Mean of shares 0..1 and its 95 % interval, (mean, low, high), with the arguments of
    `estimate`; NaN for the mean of nothing.

    Wilson's limits lie within 0..1 and never meet. They are those of as many independent answers as
    have the same error (Franco et al. 2019, PMC6690503); where all answers are alike each class
    counts as one. Simulated with 54 and 289 classes, 1 and 3 seeds (tests/test_report.py) they and
    those of `paired` hold the truth 92 to 98 times in 100, and up to 100 times where 98 % or more
    of the answers are alike in few classes."""
    if not np.atleast_1d(among).any(-1).all():
        return UNKNOWN
    mean, error, t, count = estimate(values, classes, among)
    spread = mean * (1 - mean)
    part = t**2 / np.where(error > 1e-9, spread / np.maximum(error, 1e-9) ** 2, count)
    middle = (mean + part / 2) / (1 + part)
    reach = np.sqrt(part * spread + part**2 / 4) / (1 + part)
    return mean, middle - reach, middle + reach


def t_interval(values, classes, alike=0.0):
    """Mean of any numbers and its 95 % interval, mean -+ t errors, with the arguments of
    `estimate`. alike: how far it goes for one class, where all values are the same."""
    mean, error, t, count = estimate(values, classes)
    reach = np.where(error > 1e-9, t * error, alike * t**2 / (t**2 + count))
    return mean, mean - reach, mean + reach


def paired(a, b, classes):
    """Mean of a - b, shares on the same problems and seeds, and its interval, as `t_interval`:
    where nothing differs it goes as far as Wilson's limit of a share of 0."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError("A paired difference needs the same problems and seeds on both sides, not "
                         f"{a.shape} and {b.shape}.")
    mean, low, high = t_interval(a - b, classes, alike=1.0)
    return mean, np.maximum(low, -1), np.minimum(high, 1)


def pass_at_k(n, c, k):
    """Chance that k answers, drawn without replacement from n of which c are right, hold a right
    one: the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1), unlike
    1 - (1 - c/n)^k."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---- 6. A study ----------------------------------------------------------------------------------
# A study is {arm: {seed: [evaluation, ...] by step}}. A score is named by its mode and its part,
# such as ("greedy", "first"). An evaluation has, beside what its file holds,
#   args      the flags of its run
#   self      (name of the study, name of the run, step-NNNNNN): its checkpoint
#   start     the same of the checkpoint that its run began from
#   scores    {(row, mode, part): (n,) float} of the parts in SCORES (the report adds others), and
#             {(row, "nats", kind): (n,) float}
#   episodes  [(row, its HTML)] of the samples

MODES = {"greedy": "greedy", "sampled": "temperature 1"}
PARTS = {"first": "first attempt", "episode": "whole episode"}
FIRST = ("greedy", "first")
NATS = {"teacher": "nats of a teacher's answer, -log p: how foreign it is to the model",
        "moved": "nats of an own answer, KL from the start: how far the model has moved"}


STAGES = ("base", "warmup", "sft", "rl")  # in the order of training
MAX_FILE = 1 << 28  # bytes of an evaluation


def read_checked(path, check):
    """check(the JSON in a file); any failure is one sentence that names the file."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE:  # a pipe would never end
            raise ValueError(f"it is no regular file of at most {MAX_FILE >> 20} MB")
        return check(json.loads(path.read_text("utf-8")))
    except Exception as error:  # whatever stops a check when a file is damaged
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be used ({why}): write it again with this "
                         "version.") from None


def flags_of(args):
    """The flags in an args.json, if those that are counted with are numbers."""
    for name in ("steps", "flops", "lr", "attempts"):
        if not isinstance(args.get(name, 0), (int, float)):
            raise ValueError(f"{name} is no number")
    return args


def add_scores(evaluation):
    """Fill in "scores", see above. ValueError for lists that are no scores."""
    n, scores = len(evaluation["classes"]), {}
    for row, mode, part in product(evaluation["rows"], MODES, task_class(evaluation).SCORES):
        values = evaluation["rows"][row][mode][part]
        scores[row, mode, part] = numbers(values, n, f"{row} {mode} {part}", 0, 1)
    for kind, rows in evaluation.get("nats", {}).items():
        scores |= {(row, "nats", kind): numbers(values, n, f"nats {kind} {row}", -1e9, 1e9)
                   for row, values in rows.items()}
    return evaluation | {"scores": scores}


def row_title(evaluation, row):
    """The title of a row, such as "ID", or "ID (7/target=36)" where that was trained."""
    title, own = ROWS.get(row, row), (evaluation.get("rule"), evaluation.get("visual"))
    return f"{title} ({', '.join(filter(None, own))})" if any(own) and row == "id" else title


def numbers(values, n, name, low, high):
    """A list of n numbers from low to high as an array; ValueError for anything else."""
    array = np.asarray(values, float)
    if array.shape != (n,) or not ((low <= array) & (array <= high)).all():
        raise ValueError(f"{name} is not a list of {n} times {low:g} to {high:g}")
    return array


def task_class(evaluation):
    """The class of an evaluation's problems."""
    return tasks.task_of(evaluation["suite"]).problem


def any_of(mapping):
    """The first value of a dict, for what is the same in all of them."""
    return next(iter(mapping.values()))


def any_eval(study):
    """One of its evaluations, for what is the same in all of them: suite, classes, attempts."""
    return any_of(any_of(study))[-1]


def si(flops):
    """2e12 -> "2 TFLOP"."""
    power = min(int(math.log10(max(flops, 1)) // 3), 7)
    return f"{flops / 1000 ** power:.3g} {' KMGTPEZ'[power].strip()}FLOP"


def arms_of(study):
    """The arms that are compared, SFT and RL first."""
    return ([arm for arm in study if arm not in ("base", "warmup")] or
            [arm for arm in study if arm == "warmup"])


def shown_rows(study):
    """The rows of most tables: all where they are few, else ROWS."""
    rows = any_eval(study)["rows"]
    return rows if len(rows) < 8 else ROWS


def name_of(arm):
    """An arm's name on one line and without a bar: it goes into a markdown table."""
    return arm.upper() if arm in ("sft", "rl") else " ".join(clean(arm).replace("|", "/").split())


def score_name(score):
    """("greedy", "first") -> "greedy, first attempt"."""
    return f"{MODES[score[0]]}, {PARTS[score[1]]}"


def reported(study):
    """The scores to report: whole episodes only where they have more than one attempt."""
    parts = PARTS if any_eval(study)["attempts"] > 1 else ["first"]
    return [*product(MODES, parts)]


def best_checkpoint(evals, score):
    """The evaluation with the highest score on rule OOD, the earliest of equals; the start counts
    as a checkpoint."""
    return max(evals, key=lambda e: e["scores"]["rule", *score].mean())  # the first of equals


class Stage(NamedTuple):
    """Evaluations that are reported together, one of each seed."""
    label: str
    evals: dict  # {seed: evaluation}
    name: str = ""  # a shorter label, in differences
    minus: list = []  # the keys of the stages that are subtracted from it

    def numbers(self, row, score, seeds):
        """The score of each problem under each seed: (S, n); NaN where it was not measured, for on
        the way only ROWS are evaluated, and nats not always."""
        unknown = np.full(len(any_of(self.evals)["classes"]), math.nan)
        return np.stack([self.evals[seed]["scores"].get((row, *score), unknown)
                         for seed in seeds])

    def interval(self, row, score, minus=None, other_row=None, among=None):
        """(mean, low, high) of a score over problems and seeds; NaN where it was not measured.

        minus: a Stage whose score in other_row (default: row) is subtracted, paired by problem and
        by seed. among: the score that is each problem's weight.
        """
        other, other_row = minus or self, other_row or row
        seeds = sorted(self.evals.keys() & other.evals.keys())
        if not seeds:
            return UNKNOWN
        some, values = self.evals[seeds[0]], self.numbers(row, score, seeds)
        classes = some.get("row_classes", {}).get(row, some["classes"])
        if minus:
            return paired(values, minus.numbers(other_row, score, seeds), classes)
        if score[0] == "nats":
            return t_interval(values, classes)
        return interval(values, classes, self.numbers(row, among, seeds) if among else 1)


def stages(study, score):
    """{"base", "start", "sft end", "sft best", "rl end", ...: Stage}, as far as there are any. An
    arm with another start than those before it has a stage for it, such as "start of RL"."""
    every = [*chain(*(evals for arm, seeds in study.items() if arm != "base"
                      for evals in seeds.values()))]
    # The evaluation of a checkpoint: of a run after so many steps, or at step 0 of a run from it.
    known = {each["start"]: each for each in reversed(every) if each["start"] and not each["step"]}
    known |= {each["self"]: each for each in every}
    origins, ends = {}, {}
    starts = {arm: Stage(arm, {seed: evals[-1] for seed, evals in seeds.items()})
              for arm, seeds in study.items() if arm == "base"}
    spent = {arm: np.mean([evals[-1]["flops"] for evals in study[arm].values()])
             for arm in arms_of(study)}
    for arm in spent:
        seeds, name, minus = study[arm], name_of(arm), []
        last = {seed: evals[-1] for seed, evals in seeds.items()}
        for seed, (first, *_) in seeds.items():
            if (at := first["start"]) in known:
                origin = re.sub(r"-s\d+/", "/", "/".join(at))  # but for the seed
                start = origins.setdefault(origin, f"start of {name}" if origins else "start")
                starts.setdefault(start, Stage(start, {})).evals[seed] = known[at]
                minus = [start]
        left = max(unfinished(end["args"], end) for end in last.values())
        label = f"{name}, {f'{left} (not finished)' if left else 'end'}"
        if max(spent.values()) > 1.05 * min(spent.values()):
            label += f" ({si(spent[arm])})"
        ends[f"{arm} end"] = Stage(label, last, name, [*minus, *[*ends][:3]])
        if arm == "sft":
            best = {seed: best_checkpoint(evals, score) for seed, evals in seeds.items()}
            steps = ", ".join(str(evaluation["step"]) for evaluation in best.values())
            ends["sft best"] = Stage(f"SFT at its best OOD (step {steps}) in hindsight", best,
                                     "best SFT checkpoint")
    return starts | ends


def differences(study, score):
    """{(stage, other stage, row): interval of their difference}, paired by problem and by seed, as
    far as both are there: of an arm and its start, and of an arm and the first ones before it."""
    found = stages(study, score)
    differ = {(key, other, row): stage.interval(row, score, minus=found[other])
              for key, stage in found.items() for other in stage.minus
              for row in shown_rows(study)}
    return {key: interval for key, interval in differ.items() if not math.isnan(interval[0])}


# ---- 7. Tables -----------------------------------------------------------------------------------

NONE = "\u2013"  # the cell of what was not measured


class Table(NamedTuple):
    """Lines of cells below a head, all of them texts."""
    title: str
    head: list
    lines: list


def sign_of(difference):
    """1 or -1 when the interval lies above or below 0, else 0."""
    return int(difference[1] > 0) - int(difference[2] < 0)


def brackets(interval, form="z.2f"):
    """"63.24 [58.91, 67.40]", in a format (z: no "-0.0"). A dash for the mean of nothing."""
    mean, low, high = interval
    return NONE if math.isnan(mean) else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def percent(interval, sign=""):
    """"63.2 [58.9, 67.4]"; sign "+" for differences."""
    return brackets([100 * x for x in interval], f"{sign}z.1f")


def score_table(title, lines, columns, **every):
    """A Table of scores in %, or of nats. lines, columns: [(name, choice), ...]; every: a choice
    for all cells.

    The choices of a cell are, together, its Stage and the arguments of `Stage.interval`."""
    def cell(stage, score, minus=None, **choice):
        found = stage.interval(score=score, minus=minus, **choice)
        return brackets(found) if score[0] == "nats" else percent(found, "+" if minus else "")
    cells = [[name, *(cell(**line, **column, **every) for _, column in columns)]
             for name, line in lines]
    return Table(title, ["", *(name for name, _ in columns)], cells)


def stage_table(title, study, score, best=None):
    """A line for each stage, a column for each of the shown rows, as far as it was measured; best:
    the score that chooses the best checkpoint (default: this one)."""
    found = stages(study, best or score).values()
    rows = [row for row in shown_rows(study)
            if not np.isnan([stage.interval(row, score)[0] for stage in found]).all()]
    lines = [(stage.label, {"stage": stage}) for stage in found if rows]
    columns = [(row_title(any_eval(study), row), {"row": row}) for row in rows]
    return score_table(title, lines, columns, score=score)


def pair_table(title, study, score, rows=None):
    """A line for each paired difference, in one of the rows (default: all)."""
    said = "no clear difference", "clearly higher", "clearly lower"  # 0, 1, -1
    stage = stages(study, score)
    lines = [[f"{stage[a].name} - {stage[b].name or b}, {row_title(any_eval(study), row)}",
              percent(difference, "+"), said[sign_of(difference)]]
             for (a, b, row), difference in differences(study, score).items()
             if row in (rows or [row])]
    return Table(title, ["", "points", ""], lines)


def score_tables(study, score):
    """The tables of a score: success by stage, paired differences, nats, and all scores of the task
    in each row of the suite. assets/report.py has more of walks and pictures."""
    last, found = any_eval(study), stages(study, score).values()
    title = f"{score_name(score)}: success in % [95 % interval], {len(last['classes'])} problems"
    tables = [stage_table(title, study, score),
              pair_table("paired differences on the same problems", study, score)]
    tables += [stage_table(title, study, ("nats", kind), score) for kind, title in NATS.items()]
    lines = [(f"{row_title(last, row)}: {stage.label}", {"row": row, "stage": stage})
             for row in last["rows"] for stage in found]
    columns = [(title, {"score": (score[0], name)})
               for name, title in task_class(last).SCORES.items()]
    return [*tables, score_table(f"{MODES[score[0]]}: every row, in %", lines, columns)]


def markdown(table):
    """A Table in markdown, aligned for a terminal."""
    lines = [table.head, *table.lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def table_text(study, tables_of=score_tables):
    """The tables of a study in markdown: all of the first score, the first two of the others."""
    shown = []
    for score in reported(study):
        tables = tables_of(study, score)[: 2 if shown else None]
        shown += [table for table in tables if table.lines]
    return "\n".join(f"{table.title[:1].upper()}{table.title[1:]}\n\n{markdown(table)}\n"
                     for table in shown)


def study_of(results, names):
    """A study of one evaluation of each model."""
    alone = {"args": {}, "self": "", "start": (), "step": 0, "flops": 0}
    return {f"model {name}": {0: [add_scores(result) | alone]}
            for name, result in zip(names, results)}


# ---- 8. Command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line of evaluation."""
    parser = Parser("Evaluate a model on held-out problems, or write the report of a study.")
    add = parser.add_argument
    add("model", nargs="?", help="tiny (the shipped base), a run directory or a model directory")
    add("--report", metavar="STUDY", help="print a study's tables and write its report.html")
    add("--watch", metavar="STUDY", help="write its report.html again and again while runs go on")
    add("--compare", metavar=("A", "B"), nargs=2, help="evaluate two models and their difference")
    add("--play", metavar="B", nargs="*", help="deal problems to the model, perhaps beside others")
    add("--distance", metavar="DEMONSTRATOR", help="print how foreign its answers are to the "
        "model: their -log p in nats")
    add("--suite", choices=tasks.suite_names(), help="problems to evaluate on (default: the run's, "
        "else gp-l)")
    add("--rule", help="the rule of row ID (default: the run's, else the task's)")
    add("--visual", help="the look of row ID (default: the run's, else the task's)")
    number(parser, "--n", 500, 1, 1e5, "held-out problems per row")
    add("--attempts", type=between(int, 1, 100), help="answers per question (default: the run's, "
        "else 1)")
    add("--split", choices=("train", "val", "test"), help="val to choose, test for claims "
        "(default: test, with --keep-correct train)")
    number(parser, "--k", 0, 0, 1000, "sample K answers too: pass@1 .. pass@K")
    add("--keep-correct", metavar="FILE", help="write the right ones of K answers to each problem "
        "of row ID, for train_sft.py --data")
    add("--max-new-tokens", type=between(int, 1, 1e5), help="tokens per answer (default: 64 for "
        "the tiny tokenizer, else 256)")
    number(parser, "--rollout-batch", 256, 1, 1e6, "episodes side by side")
    add("--out", help="run directory to put evals/000000.json into, for a report")
    add("--or-resume", action="store_true", help="where --out holds an evaluation with these very "
        "settings, keep it")
    add("--ask", metavar="TEXT", help="print the model's likeliest answer to this, nothing else")
    add("--image", metavar="FILE", help="a picture that goes with --ask")
    add("--export", metavar="DIR", help="write the model there, adapters merged, in bfloat16")
    add("--device", default="auto", help="auto, cpu or cuda")
    number(parser, "--threads", 0, 0, 1024, "CPU threads; 0: torch's choice")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.model or args.play, args.report, args.watch, args.compare))) != 1:
        raise ValueError("give one of: a model to evaluate, --compare and two models, --report or "
                         "--watch and a study directory.")
    args.split = args.split or ("train" if args.keep_correct else "test")
    stored = run_flags(args.model or (args.compare or args.play or [""])[0])
    args.suite = args.suite or stored.get("eval_suite") or stored.get("task", "gp-l")
    args.attempts = args.attempts or stored.get("attempts", 1)
    task = args.suite.removesuffix("-probes")
    if stored.get("task") == task:
        args.rule = args.rule or stored.get("rule")
        args.visual = args.visual or stored.get("visual")
    known = tasks.make(task, args.rule, args.visual, attempts=args.attempts,
                       tile=1120).DEMONSTRATORS  # draws nothing
    if args.distance and args.distance not in known:
        raise ValueError(f"--distance {args.distance}: choose from {', '.join(known)}.")
    if args.image and not args.ask:
        raise ValueError("--image goes with --ask: give a question about the picture.")
    if args.export and Path(args.export, "args.json").exists():  # whose checkpoint would be loaded
        raise ValueError(f"--export {args.export} holds a run: choose another directory.")
    return args


def run_flags(name):
    """The flags of the run that a name means, or whose checkpoint it is; {} of other models."""
    for path in (Path(name, "args.json"), Path(name, "..", "args.json")):
        if name and path.is_file():
            return read_checked(path, flags_of)
    return {}


EVALUATION = "evals/000000.json"


def evaluated(args):
    """The evaluation that --out holds, for --or-resume; None without one. ValueError where it holds
    another one, whose scores must not pass for new ones, or a run."""
    path = Path(args.out, EVALUATION)
    if not path.exists() and not Path(args.out, "args.json").exists():
        return None
    if not (args.or_resume and path.is_file()):
        raise ValueError(f"{args.out} holds a run or an evaluation already; choose another --out.")
    kept, asked, own = read_checked(path, dict), vars(args), tasks.task_of(args.suite)._asdict()
    differ = [f"{name} {kept.get(name)}, not {asked[name]}"
              for name in ("model", "suite", "n", "attempts", "split", "k", "rule", "visual")
              if (kept.get(name) or own.get(name)) != (asked[name] or own.get(name))]
    if differ:
        raise ValueError(f"{args.out} holds an evaluation of other settings ({'; '.join(differ)}): "
                         "take another directory, or remove that one.")
    print(f"{clean(path)} is there already, with these settings")
    return kept


def load(name, args):
    """(model, tokenizer, EvalSettings) of a name on the command line and the flags."""
    directory = find_model(name, args.suite.removesuffix("-probes"))
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype(args.device)
    model, tokenizer = load_model(directory, dtype, device)
    return model, tokenizer, EvalSettings(
        args.suite, args.n, args.attempts, args.split,
        args.max_new_tokens or default_max_new_tokens(tokenizer), args.rollout_batch, None,
        args.distance, args.rule, args.visual)


def report_result(model, tokenizer, settings, args):
    """Evaluate a model, print its tables, and write the evaluation where --out says. -> it"""
    path = Path(args.out or "", EVALUATION)
    if args.out:  # before the work, in case that it cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
    result = evaluate(model, tokenizer, settings)
    print(f"{clean(args.model)} on {args.suite}, {args.n} {args.split} problems "
          f"({result['different']:,} different ones in {len(set(result['classes'])):,} classes), "
          "success in % [95 % interval]")
    names = [row.name for row in rows_of(args.suite, args.rule, args.visual)
             if row.name not in result["rows"]]
    if names:
        print(f"left out, since tiles of {model.config.vision.image_size} pixels are too small to "
              f"show it: {', '.join(names)}")
    print(f"\n{table_text(study_of([result], [args.model]))}")
    if args.k:
        result["pass_at_k"] = pass_at_1_to_k(model, tokenizer, settings, args.k)
        lines = [[name, *(f"{100 * share:.1f}" for share in shares)]
                 for name, shares in result["pass_at_k"].items()]
        print(markdown(Table("", ["row", *(f"pass@{j + 1}" for j in range(args.k))], lines)))
    if args.out:
        result |= {"model": args.model, "k": args.k}
        write_json(path, result | {"step": 0, "flops": 0, "seconds": 0.0})
    return result


def run_script(name: str, *argv: str) -> None:
    """Run a script of assets/, which imports these files, never the reverse; ends with its
    status."""
    sys.stdout.flush()
    script = subprocess.Popen([sys.executable, Path(__file__).parent / "assets" / name, *argv])
    with suppress(KeyboardInterrupt):  # the script gets Ctrl-C too, and ends in its own way
        script.wait()
    sys.exit(script.wait())


def main(argv=None):
    """Evaluate or report; returns the evaluation, or those of --compare."""
    args = parse_args(argv)
    if args.report:
        run_script("report.py", args.report)
    if args.watch:
        run_script("report.py", args.watch, "--watch")
    for script, wanted in (("play.py", args.play is not None), ("keep.py", args.keep_correct),
                           ("distance.py", args.distance)):
        if wanted:
            run_script(script, *(argv or sys.argv[1:]))
    join_processes()
    if processes()[0]:  # one says what came out; all write the same
        sys.stdout = open(os.devnull, "w")
    if args.compare:  # one after the other in memory
        for name in args.compare:
            find_model(name, args.suite.removesuffix("-probes"))  # before the first one's minutes
        results = [evaluate(*load(name, args)) for name in args.compare]
        print(table_text(study_of(results, args.compare)))
        return results
    if args.out and (kept := evaluated(args)):
        return kept
    model, tokenizer, settings = load(args.model, args)
    if args.export:
        save_model(model, tokenizer, args.export, torch.bfloat16)
        print(f"written: {clean(args.export)}")
    elif args.ask:
        problem, greedy = tasks.Problem(), Sampling(settings.max_new_tokens, temperature=0.0)
        problem.prompt, problem.image = args.ask, args.image and open_image(args.image)
        problem.step = lambda response: tasks.Step(0.0, True, "", "asked")  # the first one ends it
        ((episode,),) = rollout(model, tokenizer, [problem], 1, greedy)
        print(clean(episode.turns[0]["response"]))
    else:
        return report_result(model, tokenizer, settings, args)
    return {}


if __name__ == "__main__":
    run_main(main)
