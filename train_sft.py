"""Supervised fine-tuning (SFT) on demonstrations, and the run that both trainers share.

    python train_sft.py --task gp-l --out runs/sft            # expert answers under one rule
    python train_sft.py --rules 10:2 11,12,13 --out runs/two  # a mixture of two rules
    python train_sft.py --data own.jsonl --out runs/own       # your own prompts and responses

  1. Demonstrations (problem and demonstrator -> token ids, mask of the learned ones), 2. The loss,
  3. One update, 4. The loop: up to here the reading path; 5. How a run ends, 6. a run,
  7. its directory, 8. start, 9. AdamW16, 10. cost, 11. data, 12. command line
"""
import argparse
import csv
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from filecmp import cmpfiles
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is loaded ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch
import torch.distributed as dist
from safetensors import SafetensorError

import tasks
from evaluate import (ROWS, Episode, EvalSettings, Parser, between, clean, default_max_new_tokens,
                      device_and_dtype, evaluate, find_model, images_for, join_processes,
                      micro_batches, number, processes, prompt_style, response_log_probs, run_main,
                      run_script, show_episode, summary, to_batch)
from model import (PARTS, LlamaVision, Tokenizer, Work, adapters_off, add_lora, add_work,
                   count_parameters, load_model, merge_lora, open_image, pass_flops, read_json,
                   read_start, save_adapter, save_model, text_work, write_atomically, write_json,
                   UMASK)

# ---- 1. Demonstrations ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Demonstrations:
    """The stream of demonstrated episodes. Episode number `index` is a pure function of these
    fields and the index, so a resumed run needs no state of the data."""
    task: str
    rules: "Mixture"
    demonstrators: "Mixture"
    visuals: "Mixture | None"  # None: the task's own look, or a task in text
    split: str
    seed: int
    style: dict  # of prompt_style: how problems are put to this model

    def episode(self, tokenizer: Tokenizer, index: int) -> Episode:
        """Draw a rule, a demonstrator and a look; make the problem; write the demonstration."""
        rng = random.Random(f"demonstrator/{self.seed}/{index}")
        rule = self.rules.draw(rng)
        kind = self.demonstrators.draw(rng)
        visual = self.visuals.draw(rng) if self.visuals else None
        problem = tasks.make(self.task, rule, visual, self.split, index, attempts=2,
                             seed=self.seed, **self.style)
        responses = problem.demonstrate(kind, rng)[::2]  # the verifier's words stand between them
        return Episode.demonstrated(problem, tokenizer, responses)


# ---- 2. The loss ---------------------------------------------------------------------------------

def summed(value: float | torch.Tensor):
    """A number or a tensor (in place), added up over the processes that torchrun started."""
    if dist.is_initialized():
        total = torch.as_tensor(value)
        dist.all_reduce(total)
        return total if value is total else total.item()
    return value


def sft_backward(model: LlamaVision, episodes: list, pad: int, *limits: int, kind="nll") -> dict:
    """Gradients of the loss, a mean over all response tokens of the batch.

    kind: "nll", -log p of each token, or "dft", which multiplies it by p as a constant: so a token
    that the model finds unlikely does not pull the hardest (Wu et al., arXiv 2508.05629).
    Every part (limits: of `micro_batches`) divides by the token count of the WHOLE batch: a mean of
    the parts' means would depend on them. FloatingPointError when the loss is not finite.
    """
    tokens = summed(sum(episode.response_tokens for episode in episodes))
    loss = 0.0
    for part in micro_batches(episodes, *limits):
        batch = to_batch(part, pad, model.device)
        log_probs = model.log_probs(batch.ids, batch.chosen, image=images_for(model, part))
        weight = log_probs.detach().exp() if kind == "dft" else 1.0
        part_loss = -(weight * log_probs).sum() / tokens
        part_loss.backward()
        loss += part_loss.item()
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not finite")
    return {"loss": loss, "tokens": tokens}


# ---- 3. One update -------------------------------------------------------------------------------

def update(model: LlamaVision, optimizer, lr: float, max_grad_norm: float) -> dict:
    """Clip the gradient to `max_grad_norm` and take one step with the rate `lr`.

    Returns {"grad_norm" (before clipping), "learning_rate", "changed" (whether it did anything)},
    or {} without a gradient. FloatingPointError, before that, when the norm is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    used = summed(torch.tensor([float(p.grad is not None) for p in trained]))
    trained = [p for p, count in zip(trained, used.tolist()) if count]
    if not trained:
        return {}
    for p in trained:
        p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient is not finite")
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = parameter_sums(trained[-8:])  # what changes any one changes some of the last
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    changed = not torch.equal(before, parameter_sums(trained[-8:]))
    return {"grad_norm": norm, "learning_rate": lr, "changed": changed}


# ---- 4. The loop ---------------------------------------------------------------------------------

def main(argv=None):
    """Train; returns the scores of the last evaluation."""
    args = parse_args(argv)
    return train(start_run(args), args)


def train(run, args):
    """Demonstrations -> loss -> one update, until the run's steps or FLOPs are spent."""
    model, tokenizer = run.model, run.tokenizer
    data = demonstrations(args, prompt_style(model, tokenizer))
    with run.failing_safely():
        while run.goes_on():
            run.episodes = [data.episode(tokenizer, i) for i in run.indices(args.batch)]
            metrics = sft_backward(model, run.episodes, tokenizer.pad, args.micro_batch,
                                   args.micro_tokens, kind=args.loss)
            metrics |= update(model, run.optimizer, run.lr(), args.max_grad_norm)
            run.finish_step(metrics, sft_flops(model, run.episodes))
    return run.end()


# ==== The reading path ends here. Everything below can be skipped. ====

METRICS = {  # of a step, named as in TRL where they are the same; --help prints them
    "loss": "mean of -log p over the response tokens (dft: of p times that)",
    "eval_loss": "mean of -log p over the response tokens of --eval-data",
    "grad_norm": "norm of the gradient before clipping",
    "learning_rate": "of the step",
    "tokens": "response tokens of the batch",
    "update_speed": "those a second of the update",
    "peak_gb": "most memory that a GPU held in the step, in 10^9 bytes",
    "step_time": "seconds of the step",
}
ADDED = ("loss", "kl", "clip_fraction", "ratio_error_mean")  # each process has a part of them

# ---- 5. How a run ends ---------------------------------------------------------------------------


class Ending:
    """The part of a Run that leaves it whole however it ends: checkpoints, signals, too little
    memory, numbers that are not finite."""

    def save(self):
        """Write a checkpoint from which `--resume` continues bit for bit."""
        state = {"step": self.step, "progress": asdict(self.progress),
                 "random": self.random or random_states(self.generator),
                 "optimizer": self.optimizer.state_dict(), "optimizer_kind": self.args.optimizer}
        base = self.args.init_path if self.args.lora_rank else None
        self.directory.save(self.model, self.tokenizer, state, base)

    def restore(self, state):
        """Continue from the state of a checkpoint. ValueError when it is of another optimizer."""
        try:  # torch itself accepts the moments of another optimizer, whatever they are called
            if state.get("optimizer_kind", self.args.optimizer) != self.args.optimizer:
                raise ValueError("another optimizer")
            self.optimizer.load_state_dict(state["optimizer"])
            restore_random_states(state["random"], self.generator)
            self.progress = Progress(**state["progress"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
            raise ValueError(f"the newest checkpoint of {self.directory.path} holds the state of "
                             "another optimizer or model than its args.json asks for.") from None

    def end(self):
        """Save the last step and say how the run ended; returns the scores of the last evaluation.
        ValueError when it ended because it had become useless."""
        if self.directory.saved < self.step:
            self.save()
        if self.useless:
            raise ValueError(self.useless)
        path, stopped = clean(self.directory.path), self.stopping and self.share() < 1
        self.say(f"stopped at step {self.step}; go on with --resume {path}" if stopped else
                 f"done: {path}")
        if stopped and self.status:
            sys.exit(self.status)  # a script must not take a stopped run for a finished one
        return self.scores

    def say(self, text, file=None):
        """Print. When the reader has left (`| head`) or the disk is full, stop after a save."""
        if processes()[0]:
            return
        file = file or sys.stdout
        try:
            print(text, file=file, flush=True)
        except OSError:
            self.stopping, self.status = True, self.status or 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())

    @contextmanager
    def failing_safely(self):
        """Around the loop: where a loss is not finite the batch is kept for a look, and where
        memory runs out what was done is saved. ValueError that says so."""
        try:
            yield
        except FloatingPointError as error:
            raise self.not_finite(error) from None
        except (MemoryError, RuntimeError) as error:
            known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not known and "allocate" not in str(error):
                raise
            message = " ".join(clean(error).split())[:240]  # before the step's tensors are freed
        else:
            return
        self.optimizer.zero_grad(set_to_none=True)
        if self.random and self.step > self.directory.saved:
            self.save()
        less = ("a smaller --micro-tokens or --micro-batch, or --recompute" if self.phase ==
                "update" else f"a --rollout-batch below {self.args.rollout_batch}")
        raise ValueError(f"out of memory in the {self.phase} after step {self.step} ({message}): "
                         f"go on at step {max(0, self.directory.saved)} with --resume "
                         f"{self.directory.path} and {less}.")

    def not_finite(self, error):
        """Keep the batch whose loss or gradient was not finite for a look; returns the error that
        ends the run."""
        step, directory = self.step + 1, self.directory
        path = directory.path / f"not-finite-{step:06d}.json"
        write_json(path, [{"prompt": e.problem.prompt, "turns": e.turns, "ids": e.ids,
                           "response_mask": e.response_mask, "log_probs": e.log_probs}
                          for e in self.episodes])
        start = directory.path if directory.saved > 0 else "and the same start"
        return ValueError(f"step {step}: {error}, so this update was not made; its batch is in "
                          f"{path}. Start a new run with --init {start} and a lower --lr or "
                          "--max-grad-norm.")

    def catch_signals(self):
        """Ctrl-C, SIGTERM and SIGHUP finish the step and save; a second one exits at once."""
        def handler(number, frame):
            if self.stopping:
                os._exit(128 + number)
            self.stopping, self.status = True, 128 + number
            self.say("stopping after this step; once more to exit at once", sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, handler)


# ---- 6. A run ------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is: plain values, kept in its checkpoints."""

    step: int = 0
    flops: float = 0
    flops_paper: float = 0  # by the paper's formula, which knows no KV cache
    seconds: float = 0.0  # of training
    eval_seconds: float = 0.0
    evals_done: int = 0
    warm: float | None = None  # share of the run at which the learning rate was at its peak
    idle: dict = field(default_factory=dict)  # reason -> wasted steps, nearly in a row
    recent: list = field(default_factory=list)  # success of the last 20 steps of RL
    best: float = 0.0  # highest mean of 20 steps


class Run(Ending):
    """A model in training: how far it is, and everything that a finished step leaves behind.

    It ends after --steps, or after --flops when a budget is given: so two arms spend the same.
    """

    shown = METRICS  # their names are the columns on the terminal, as far as they are measured
    columns = ()
    episodes = ()  # of the step
    random = None  # states after the last whole step; None while an update may be half made

    def __init__(self, args, directory, model, tokenizer, optimizer):
        self.args, self.directory = args, directory
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.generator = torch.Generator(model.device).manual_seed(args.seed)  # of sampling
        self.progress, self.laps, self.scores, self.warned = Progress(), {}, {}, {}
        self.stopping, self.useless, self.status = False, "", 0  # status: of a stopped process

    @property
    def step(self):
        """Finished steps."""
        return self.progress.step

    def share(self):
        """0 at the start, 1 at the end."""
        args, progress = self.args, self.progress
        return min(1.0, progress.flops / args.flops if args.flops else self.step / args.steps)

    def goes_on(self):
        """Whether another step follows; starts its clock."""
        self.clock, self.laps, rank = time.time(), {}, processes()[0]
        self.phase = "rollout" if "group" in self.args else "update"
        self.stopping = summed(int(self.stopping)) > 0
        if rank:  # the other processes sample differently, and need no state for it
            self.generator.manual_seed((self.args.seed + 10**6 * self.step + rank) % 2**63)
        if self.generator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return not (self.share() >= 1 or self.useless or self.stopping)

    def indices(self, count):
        """Those of the step's `count` problems that fall to this process."""
        return share_of(self.step, count)

    def played(self, groups):
        """Note the rollout of a step of RL, and its seconds."""
        self.episodes, self.phase = sum(groups, []), "update"
        self.laps["rollout_seconds"] = time.time() - self.clock

    def lr(self):
        """Learning rate of the next step: linear warm-up, then a cosine over the rest."""
        args, progress, self.random = self.args, self.progress, None
        if self.step + 1 < args.lr_warmup:
            return args.lr * (self.step + 1) / args.lr_warmup
        if args.schedule == "constant":
            return args.lr
        if progress.warm is None:
            progress.warm = self.share()
        left = (1 - self.share()) / (1 - progress.warm)
        return args.lr * (args.lr_end + (1 - args.lr_end) * 0.5 * (1 - math.cos(math.pi * left)))

    def eval_due(self):
        """Whether the next of --evals evaluations is reached: start and end included; a single one
        is the end."""
        done, wanted, share = self.progress.evals_done, self.args.evals, self.share()
        if done >= wanted:
            return False
        return share >= 1 or wanted > 1 and share * (wanted - 1) >= done

    def finish_step(self, metrics, flops, groups=()):
        """Count, print, evaluate, log and save a step. flops: ours and by the paper's formula;
        groups: the rollouts of RL, of which an evaluation keeps samples."""
        for episode in sum(groups, []):
            episode.encoded = []  # frees the pictures before an evaluation encodes others
        progress, changed = self.progress, metrics.pop("changed", None)
        metrics = over_processes(metrics | self.measures(metrics["tokens"]))
        self.random = random_states(self.generator)
        progress.step += 1
        progress.flops += summed(flops[0])
        progress.flops_paper += summed(flops[1])
        progress.seconds += metrics["step_time"]
        self.say(self.line(metrics))
        self.notice_waste(metrics, changed)
        self.notice_collapse(metrics)
        record = {"step": self.step, "flops": progress.flops, **metrics}
        due = self.eval_due()
        try:
            if due:
                self.evaluate()
                self.directory.write_samples(self.step, groups)
                record |= self.scores
        finally:
            self.directory.log(record)
        if due or self.args.save_every and self.step % self.args.save_every == 0:
            self.save()
        self.warn_truncated("sampled", metrics.get("truncated", 0.0))

    def measures(self, tokens):
        """Times, speeds and memory of a step in which so many tokens were sampled or learned."""
        seconds, played = time.time() - self.clock, self.laps.get("rollout_seconds", 0)
        found = self.laps | {"step_time": seconds, "update_speed": tokens / (seconds - played)}
        if played:
            found |= {"update_seconds": seconds - played, "rollout_speed": tokens / played}
        if self.generator.device.type == "cuda":
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    def notice_waste(self, metrics, changed):
        """Count steps in a row that taught nothing; too many end the run, after a save."""
        learned = "grad_norm" in metrics
        if learned:
            self.count_waste("update", not changed, 10, "no trained parameter moved "
                             f"(--lr {metrics['learning_rate']:g}, gradient norm "
                             f"{metrics['grad_norm']:g}): raise --lr, or see why the loss has "
                             "no gradient.")
        self.count_waste("signal", not learned, 50, "no group had unequal returns (success "
                         f"{100 * metrics.get('success', 0):.0f} %), so nothing could be learned: "
                         "raise --group or --temperature, or give another --init.")

    def count_waste(self, reason, wasted, limit, sentence):
        """Count the wasted steps, less ten for each good one, so that one lucky group in a while
        does not hide the others; `limit` of them make the run useless."""
        idle = self.progress.idle
        idle[reason] = max(0, idle.get(reason, 0) + (1 if wasted else -10))
        if idle[reason] and idle[reason] % limit == 0:
            self.useless = f"stopped after {limit} steps in which {sentence}"

    def line(self, metrics):
        """The line that the terminal shows of a step, now and then below the names of its cells."""
        share, progress = self.share(), self.progress
        evals_left = max(0, self.args.evals - progress.evals_done)
        left = progress.seconds / max(share, 1e-9) * (1 - share)
        left += evals_left * progress.eval_seconds / max(1, progress.evals_done)
        minutes, seconds = divmod(round(left), 60)
        cells = {"step": self.step, "done": f"{100 * share:.0f}%",
                 "left": f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"}
        measured = {*self.columns, *metrics}
        cells |= {name: metrics.get(name, "-") for name in self.shown if name in measured}
        head = self.step % 20 == 1 or [*self.columns] != [*cells]
        self.columns = cells
        return aligned(dict(zip(cells, cells))) * head + aligned(cells).rstrip("\n")

    def evaluate(self):
        """Evaluate the model as it is now, write evals/NNNNNN.json and print one line."""
        args, progress, self.phase = self.args, self.progress, "evaluation"
        progress.evals_done += 1
        # On the way only the rows of the curves are evaluated.
        rows = args.eval_rows or (None if self.share() >= 1 else ROWS)
        settings = EvalSettings(args.eval_suite or args.task, args.eval_n, args.attempts,
                                args.eval_split, args.max_new_tokens,
                                args.rollout_batch, rows and tuple(rows),
                                args.eval_teacher, args.rule, args.visual)
        moved = self.moved if args.eval_moved and args.init_path else None
        result = evaluate(self.model, self.tokenizer, settings, moved)
        result |= {"step": self.step, "flops": progress.flops, "flops_paper": progress.flops_paper,
                   "seconds": round(progress.seconds, 2)}
        if not processes()[0]:
            write_json(self.directory.path / "evals" / f"{self.step:06d}.json", result)
        self.scores = summary(result) | self.held_out_loss()
        said = [f"{name} {100 * value:.1f}" if name.endswith("/first") else f"{name} {value:.3g}"
                for name, value in self.scores.items()
                if name.endswith(("/first", "loss")) or "nats" in name]
        said = (f"  eval at step {self.step}, {args.eval_n} held-out problems, first attempt in %: "
                f"{', '.join(said)}")
        self.say(fill(said, 100, subsequent_indent="    "))
        self.warn_truncated("held-out", result["truncated"])
        progress.eval_seconds += result["eval_seconds"]

    def held_out_loss(self):
        """{"eval_loss"} of --eval-data, {} without it."""
        if not getattr(self.args, "eval_data", None):
            return {}
        episodes = [conversation(self.tokenizer, *each)
                    for each in read_conversations(self.args.eval_data, self.args.task)]
        sums = response_log_probs(self.model, episodes, self.tokenizer)
        return {"eval_loss": -sum(sums) / sum(episode.response_tokens for episode in episodes)}

    @cached_property
    def reference(self):
        """The start's policy, see `make_reference`."""
        return make_reference(self.model, self.args)

    def moved(self, episodes):
        """log p - log p under the start of each sampled episode, in nats, a list. Its mean is an
        unbiased estimate of KL(policy || start) of an episode."""
        start = response_log_probs(self.model, episodes, self.tokenizer, self.reference)
        return [sum(episode.log_probs) - value for episode, value in zip(episodes, start)]

    def warn_truncated(self, which, share):
        """Warn when many answers were cut off, for a cut answer is a wrong one."""
        if share > 0.3:
            self.warn(which, f"{100 * share:.0f} % of the {which} answers were cut off at "
                      f"--max-new-tokens {self.args.max_new_tokens}; raise it, or warm up longer.")

    def warn(self, kind, sentence):
        """Print a warning, each kind at most once in 50 steps."""
        if self.step >= self.warned.get(kind, self.step):
            self.warned[kind] = self.step + 50
            self.say(f"warning: step {self.step}: {sentence}", sys.stderr)

    def notice_collapse(self, metrics):
        """Warn when success is below half of its best for 20 steps, or all answers are alike and
        wrong."""
        if "success" not in metrics:
            return
        progress = self.progress
        recent = progress.recent = [*progress.recent, metrics["success"]][-20:]
        progress.best = max(progress.best, sum(recent) / 20)  # too low at first, never too high
        if max(recent) < progress.best / 2:
            self.warn("collapse", "success has been below half of its best, "
                      f"{100 * progress.best:.0f} %, for 20 steps: --lr {self.args.lr:g} is too "
                      "high for this run.")
        elif metrics["entropy"] < 0.05 and not metrics["success"]:
            self.warn("collapse", f"the answers hardly vary (entropy {metrics['entropy']:.3f}) and "
                      f"none is right: start again with a --lr below {self.args.lr:g}.")


def aligned(cells):
    """A line of cells {name: value}, each in a column that is wide enough for its name."""
    line = ""
    for name, value in cells.items():
        width = max(7, len(name))
        if isinstance(value, float):
            usual = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
            value = usual if len(usual) <= width else f"{value:.1e}"
        line += f" {value:>{width}}"
    return line + "\n"


def parameter_sums(parameters):
    """The sum of each parameter, in float64: some differ after any update that moved something."""
    return torch.stack([p.detach().sum(dtype=torch.float64) for p in parameters])


def share_of(step: int, count: int) -> range:
    """The indices that fall to this process of a step's `count` problems."""
    rank, number = processes()
    return range(step * count + rank, (step + 1) * count, number)


def over_processes(metrics):
    """The metrics of the whole batch from those that each process has of its share: their mean
    (of ratio_error and peak_gb too), or the sum of their parts."""
    if not dist.is_initialized():
        return metrics
    added = summed(torch.tensor([*metrics.values()], dtype=torch.float64)).tolist()
    return {name: value if name in ADDED else value / processes()[1]
            for name, value in zip(metrics, added)}


def random_states(generator):
    """Every random state of training; problems need none, since they are made from their index."""
    states = {"torch": torch.get_rng_state(), "sampling": generator.get_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states, generator):
    """The reverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    generator.set_state(states["sampling"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ---- 7. Its directory ----------------------------------------------------------------------------

CHECKSUMS = "checksums.json"
LOCKS = {}  # inode -> file `lock` of a run of this process, held until it ends
CHECKPOINT = re.compile(r"step-[0-9]{6,9}")


class RunDirectory:
    """runs/NAME: the files of one run.

    args.json          its arguments
    metrics.jsonl      one JSON object a step
    metrics.csv        the same as a table, up to the newest checkpoint: written whole with it, so
                       that --resume, which goes back to a checkpoint, never finds later lines
    evals/NNNNNN.json  an evaluation, problem by problem
    samples/           episodes in plain text (RL)
    step-NNNNNN/       a checkpoint: a model directory in the hub's layout (an adapter in PEFT's),
                       the checksums of its files and, in the --keep newest, state.pt:
                       optimizer, step, random states; plain values only
    latest             the name of the newest complete checkpoint, written last
    start.json         the weights that the run began from: their path as seen from the run, their
                       sizes and checksums (of the last MB)
    source/            a copy of the five files and the texts they read, since people edit them
    lock               held by the process that writes
    A file or directory is written under another name first (.NAME.*.tmp) and renamed: it is whole
    or absent.
    """

    def __init__(self, path, resume, keep=2):
        self.path, self.keep, self.saved = Path(path), keep, -1  # step of the newest checkpoint
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{path} is there already and is no directory; choose another --out.")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()  # only one of two starts wins
        others = {child.name for child in self.path.iterdir()} - {"lock", "source", "start.json"}
        if others and not resume:
            self.release()
            raise ValueError(f"{path} is there already and not empty; choose another --out, or go "
                             f"on with --resume {path}.")

    def create(self, args):
        """Write the beginning of a new run, args.json last: with it the run is there."""
        here = Path(__file__).parent
        (self.path / "source" / "assets").mkdir(parents=True, exist_ok=True)
        for path in [here / name for name in SOURCES] + [*here.glob("assets/*.json")]:
            shutil.copy(path, self.path / "source" / path.relative_to(here))
        here = os.path.relpath(args.init_path or ".", self.path)
        start = {"from_here": here, "weights": start_checksums(args.init_path),
                 "data": data_checksums(args)}
        write_json(self.path / "start.json", start)
        self.write_arguments(args)

    def write_arguments(self, args):
        """At the beginning, and again when a run is resumed, for some may have changed: not where
        it lay and began, which is said as seen from where it was started."""
        path = self.path / "args.json"
        stored = read_json(path) if args.resume else vars(args)
        places = {name: stored[name] for name in ("out", "init_path")}
        write_json(path, vars(args) | places | {"resume": None})

    def release(self):
        """Give back a claimed directory in which no run has begun."""
        lock = self.path / "lock"
        file = LOCKS.pop(lock.stat().st_ino, None)
        if file and not (self.path / "args.json").exists():
            lock.unlink()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def open(self):
        """Clear the leftovers of a killed process and make the folders."""
        for stale in self.path.glob(".*.tmp"):
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale)
            else:
                stale.unlink()
        for folder in ("evals", "samples"):
            (self.path / folder).mkdir(exist_ok=True)

    def lock(self):
        """Keep other processes out of this run; the lock ends with the process, however it ends."""
        file = open(self.path / "lock", "a")
        key = os.fstat(file.fileno()).st_ino
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS[key] = file
        except BlockingIOError:
            if key not in LOCKS:
                raise ValueError(f"{self.path} is being written by another process; wait for it or "
                                 "stop it.") from None

    def find_start(self, args):
        """The path of the weights that a run began from, which are its base or its reference: where
        they were, or where they are now as seen from the run, if both were moved. ValueError when
        neither holds those very weights."""
        start = read_start(self.path)
        if start.get("data", {}) != data_checksums(args):
            raise ValueError(f"{self.path} began with another --data or --eval-data than "
                             f"{args.data or args.eval_data} holds now; put it back to continue.")
        if not args.init_path or not start:
            return args.init_path
        places = [str((self.path / str(start.get("from_here"))).resolve()), args.init_path]
        for place in places:
            if start_checksums(place) == start.get("weights"):
                return place
        if args.lora_rank or getattr(args, "kl_coef", 0) or getattr(args, "kl_every", 0):
            raise ValueError(f"{self.path} began from other weights than {' and '.join(places)} "
                             "hold now; put those back to continue.")
        return args.init_path

    def log(self, record):
        """Append one record to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def lines(self, step):
        """The lines of metrics.jsonl up to a step."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text("utf-8", "replace").split("\n") if path.is_file() else []
        return [line for line in lines if step_of(line) <= step]

    def write_table(self, step):
        """metrics.csv up to a step; what was not measured in all steps stays empty in others."""
        records = [json.loads(line) for line in self.lines(step)]

        def write(path):
            with open(path, "w", newline="") as file:
                table = csv.DictWriter(file, dict.fromkeys(chain(*records)))
                table.writeheader()
                table.writerows(records)
        write_atomically(self.path / "metrics.csv", write)

    def write_samples(self, step, groups, count=4):
        """The first episode of a few groups as readable JSON."""
        if groups:
            shown = [show_episode("train", group[0]) for group in groups[:count]]
            write_json(self.path / "samples" / f"{step:06d}.json", shown)

    def save(self, model, tokenizer, state, base):
        """A checkpoint of step state["step"]: the adapter when `base` names its model, else all
        weights."""
        step = state["step"]
        name = f"step-{step:06d}"
        try:
            with replaced(self.path / name) as fresh:
                if base:
                    save_adapter(model, fresh, base)
                else:
                    save_model(model, tokenizer, fresh)
                write_atomically(fresh / "state.pt", lambda path: torch.save(state, path))
                write_json(fresh / CHECKSUMS, checksums(fresh))
            self.point_to(name)
            self.write_table(step)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, in three words
            raise ValueError(f"the checkpoint of step {step} could not be written to {self.path} "
                             f"({str(error)[:120]}); those before it are as they were. Make room, "
                             f"then --resume {self.path}.") from None
        self.saved = step
        for state in self.states()[: -self.keep]:
            self.reduce(state.parent, state)

    def reduce(self, checkpoint, state):
        """Of an old checkpoint the weights stay if they were evaluated and take less than 2 GB."""
        state.unlink()
        evaluated = self.path / "evals" / f"{checkpoint.name[5:]}.json"
        if not evaluated.exists() or size_of([checkpoint]) > SMALL:
            gone = checkpoint.with_name(f".{checkpoint.name}.tmp")
            os.replace(checkpoint, gone)  # no reader finds half of it
            shutil.rmtree(gone, ignore_errors=True)

    def states(self):
        """The files state.pt of the run's checkpoints, oldest first."""
        found = [path for path in self.path.glob("step-*/state.pt")
                 if CHECKPOINT.fullmatch(path.parent.name)]  # not a copy of somebody's own
        return sorted(found, key=lambda path: int(path.parent.name[5:]))

    def point_to(self, name):
        """Make a checkpoint the one that others find."""
        pointer, content = self.path / "latest", f"{name}\n"
        if not pointer.is_file() or pointer.read_bytes() != content.encode():
            write_atomically(pointer, lambda path: path.write_text(content))

    def newest_whole_checkpoint(self):
        """(directory, state), going back from the newest; (None, None) if none has been written."""
        for path in reversed(self.states()):
            directory = path.parent
            try:
                written = read_json(directory / CHECKSUMS)
                if "state.pt" not in written or written != checksums(directory, written):
                    raise ValueError("a file is not as it was written")
                state = torch.load(path, map_location="cpu", weights_only=True)
                if type(state["step"]) is not int:
                    raise ValueError("its state has no step")
                return directory, state
            except Exception as error:  # torch.load alone has half a dozen kinds for a damaged file
                print(f"{directory} is damaged ({clean(error)[:120]}); going back to the "
                      "checkpoint before it.", file=sys.stderr)
        if any(CHECKPOINT.fullmatch(path.name) for path in self.path.iterdir()):
            raise ValueError(f"no checkpoint of {self.path} can be continued; start a new run with "
                             "--init and one of its step-NNNNNN directories, or --model.")
        return None, None

    def resume_point(self):
        """`newest_whole_checkpoint`, and everything that the run wrote after it is taken back:
        later lines of the metrics and later evaluations come again."""
        directory, state = self.newest_whole_checkpoint()
        self.saved = step = state["step"] if state else 0
        if directory:
            self.point_to(directory.name)
            self.write_table(step)
        kept = "".join(line + "\n" for line in self.lines(step))
        write_atomically(self.path / "metrics.jsonl", lambda path: path.write_text(kept))
        for folder in (self.path / "evals", self.path / "samples"):
            if folder.is_symlink():
                raise ValueError(f"{folder} is a link; put the directory itself there to continue.")
            for path in folder.glob("*.json"):
                if path.stem.isdecimal() and int(path.stem) > step:
                    path.unlink()
        return directory, state


class OtherProcess(RunDirectory):
    """What the other processes of torchrun have instead: they read, and only the first writes."""

    def __init__(self, path):
        self.path, self.saved = Path(path), math.inf

    def nothing(self, *args):
        """In place of everything that writes."""
    create = write_arguments = open = release = log = write_samples = save = nothing

    def resume_point(self):
        """The same, without taking anything back."""
        return self.newest_whole_checkpoint()


SMALL = 2e9  # bytes
SOURCES = ("train_sft.py", "train_rl.py", "evaluate.py", "model.py", "tasks.py",
           "assets/report.html", "assets/emblems.png")


@contextmanager
def replaced(path):
    """A new directory that takes the place of `path` when the block ends, and is removed when the
    block fails."""
    fresh = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))  # nobody can guess it
    try:
        yield fresh
        fresh.chmod(0o777 & ~UMASK)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def size_of(folders):
    """Bytes of the files in them."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


def checksums(directory, names=None, last=1 << 62):
    """{file name: [bytes, CRC-32 of the `last` bytes]} of files in a directory (default: all)."""
    found = {}
    for name in sorted(os.listdir(directory) if names is None else names):
        with open(directory / name, "rb") as file:
            size, crc = os.fstat(file.fileno()).st_size, 0
            file.seek(max(0, size - last))
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        found[name] = [size, crc]
    return found


def start_checksums(path):
    """The checksums of the weights in a model directory; {} without any."""
    weights = [file.name for file in Path(path).glob("*.safetensors")] if path else []
    return checksums(Path(path or ""), weights, last=1 << 20)


def data_checksums(args):
    """The checksums of the files of --data and --eval-data."""
    return checksums(Path(), filter(None, map(vars(args).get, ("data", "eval_data"))))


def step_of(line):
    """The step of a line of the metrics; infinity for one that was cut off or damaged."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


# ---- 8. Start ------------------------------------------------------------------------------------


def start_run(args: argparse.Namespace, load=None, optimizer_for=None) -> Run:
    """A run of a training script, new or resumed, ready for its first step.

    load(args, device, dtype) -> (model, tokenizer) and optimizer_for, in place of load_model and
    make_optimizer, are for scripts that make models in another way.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    join_processes()
    for name in ("batch", "problems"):
        if getattr(args, name, 0) % processes()[1]:
            raise ValueError(f"--{name} must be a multiple of torchrun's {processes()[1]} "
                             "processes.")
    directory = (OtherProcess(args.out) if processes()[0] else
                 RunDirectory(args.out, bool(args.resume), args.keep))
    try:
        if args.resume:
            args.init_path = directory.find_start(args)
        run, state = prepare_run(args, directory, load, optimizer_for or make_optimizer)
        disk = check_disk(run)
        if not args.resume:
            directory.create(args)
    except BaseException:
        directory.release()
        raise
    directory.open()
    if state:
        run.restore(state)
    if args.resume:
        directory.write_arguments(args)
    run.say(f"{describe(run)}, {disk}")
    run.catch_signals()
    with run.failing_safely():
        if run.eval_due():
            run.evaluate()
    return run


def check_disk(run):
    """Say what the checkpoints will take. ValueError when the disk has less."""
    path, wanted = run.directory.path, disk_bytes(run.model, run.args)
    free = shutil.disk_usage(path if path.exists() else ".").free + size_of(path.glob("step-*/"))
    if wanted > free:
        raise ValueError(f"the checkpoints will take {wanted / 1e9:.2f} GB and {path} has room for "
                         f"{free / 1e9:.2f}: make room, or lower --keep.")
    return f"checkpoints up to {wanted / 1e9:.2f} of {free / 1e9:.0f} GB"


def disk_bytes(model: LlamaVision, args: argparse.Namespace) -> int:
    """What a run's checkpoints take at most. A new one is whole before an old one goes."""
    named = model.named_parameters()
    weights = sum(p.nbytes for name, p in named if ".lora_" in name or not args.lora_rank)
    state = count_parameters(model)["trained"] * (4 if args.optimizer == "adamw16" else 8)
    return (args.keep + 1) * (weights + state) + args.evals * weights * (weights < SMALL)


def prepare_run(args, directory, load, optimizer_for):
    """(Run, state of its checkpoint or None): the model is loaded, nothing is written yet."""
    device, dtype = device_and_dtype(args.device)
    if not args.lora_rank:
        dtype = torch.float32
    if args.optimizer == "adamw16":
        dtype = torch.bfloat16
    checkpoint, state = directory.resume_point() if args.resume else (None, None)
    if load and not checkpoint:
        model, tokenizer = load(args, device, dtype)
    else:
        model, tokenizer = load_model(checkpoint or args.init_path, dtype, device)
    if not checkpoint:
        merge_lora(model)  # an adapter that --init brings belongs to the start, not to the training
    set_limits(args, tokenizer)
    check_legible(args, prompt_style(model, tokenizer))
    choose_parameters(model, args)
    model.recompute(args.recompute)
    return Run(args, directory, model, tokenizer, optimizer_for(model, args)), state


def set_limits(args, tokenizer):
    """Fill in the limits whose defaults depend on the size of the model."""
    args.max_new_tokens = args.max_new_tokens or default_max_new_tokens(tokenizer)
    args.micro_batch = args.micro_batch or 256
    args.micro_tokens = args.micro_tokens or (2**20 if tokenizer.short else 4096)


def check_legible(args, style):
    """ValueError for a trained look that cannot be read at this model's tile size."""
    for visual in getattr(args, "visuals", None) or [args.visual]:
        visual = visual and visual.partition(":")[0]
        tasks.make(args.task, args.rule, visual, "train", 0, **style)


def describe(run):
    """The first line of a run: its sizes, its device."""
    sizes, args = count_parameters(run.model), run.args
    how = f"LoRA rank {args.lora_rank}" if args.lora_rank else "full fine-tuning"
    continued = f", continued at step {run.step}" if args.resume else ""
    source = run.directory.path / "source"
    if cmpfiles(Path(__file__).parent, source, SOURCES, shallow=False)[1]:
        continued += "; begun with the code in its source/: a new --out shows what changes do"
    return (f"{clean(run.directory.path)}: {sizes['decoder']:,} decoder + {sizes['vision']:,} "
            f"vision parameters, {sizes['trained']:,} trained ({how}), {run.model.device}, "
            f"{torch.get_num_threads()} threads{continued}")


def choose_parameters(model, args):
    """Let the parameters require a gradient that are trained: adapters, or whole parts. The parts
    are those of --train; by default the decoder, and in full fine-tuning on pictures all."""
    pictures = tasks.TASKS[args.task].pictures
    parts = args.train or (list(PARTS) if pictures and not args.lora_rank else ["decoder"])
    if has_adapters(model):
        return
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, tuple(PARTS[part] for part in parts))
        return
    model.vision_model.requires_grad_("tower" in parts)
    model.multi_modal_projector.requires_grad_("projector" in parts)
    model.language_model.requires_grad_("decoder" in parts)
    if not pictures:  # text gives the cross layers no gradient
        for i in model.config.text.cross_attention_layers:
            model.language_model.model.layers[i].requires_grad_(False)


def make_reference(model, args):
    """A function (episodes, ids, chosen, images, temperature=1.0) -> log-probs (N,) of the start.

    With LoRA it is this model with its adapters off, else a second model with the start's weights.
    Where tower or projector are trained the start looks at the pictures with its own eyes.
    """
    dtype = model.language_model.lm_head.weight.dtype
    start = model if args.lora_rank else load_model(args.init_path, dtype, model.device)[0]

    def reference(episodes, ids, chosen, images=None, temperature=1.0):
        with torch.no_grad(), adapters_off(start) if args.lora_rank else nullcontext():
            if model.trains_vision:
                images = images_for(start, [replace(each, encoded=[]) for each in episodes])
            return start.log_probs(ids, chosen, temperature, images)

    return reference


def has_adapters(model):
    """Whether the model carries LoRA."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def make_optimizer(model, args):
    """AdamW on everything that requires a gradient; --optimizer adamw16: see AdamW16."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter would be trained; give --lora-rank 1 or more, or 0 for full "
                         "fine-tuning.")
    kind = AdamW16 if args.optimizer == "adamw16" else torch.optim.AdamW
    return kind(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)


# ---- 9. AdamW16 ----------------------------------------------------------------------------------


class AdamW16(torch.optim.Optimizer):
    """AdamW with everything in bfloat16: 8 bytes a parameter with its gradient instead of 16 (or 18
    with master weights).

    The step is computed in float32, piece by piece; weight and second moment are then rounded up
    or down at random, the nearer the likelier (the first moment to nearest). Rounded to nearest, a
    step below bfloat16's spacing, 1/256 of the value, would be lost every time, and a slow moment
    would never move (Zamirai et al., arXiv 2010.06192).
    """

    def __init__(self, params, **settings):  # lr, betas, weight_decay
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                tensors = (p.data, p.grad, state["m"], state["v"])
                pieces = (x.reshape(-1).split(2**24) for x in tensors)  # 0.5 GB at a time
                for piece in zip(*pieces):
                    self.step_piece(*piece, state["step"].item(), group)

    def step_piece(self, weight, grad, m16, v16, t, group):
        """Step number t of a piece of a parameter, with its two moments."""
        (beta1, beta2), lr, grad = group["betas"], group["lr"], grad.float()
        m = m16.float().lerp_(grad, 1 - beta1)
        v = v16.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        change = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt_() + 1e-8)
        weight_now = weight.float().mul_(1 - lr * group["weight_decay"])
        round_at_random(weight, weight_now.sub_(change, alpha=lr))
        m16.copy_(m)
        round_at_random(v16, v)


def round_at_random(target, value):
    """Write float32 `value` into `target`; for bfloat16 up or down at random so that the mean is
    `value`."""
    if target.dtype == torch.bfloat16:  # its bits are the upper half of float32's: noise in the
        noise = torch.randint_like(value, 2**16, dtype=torch.int32)  # lower half carries over
        value = (value.view(torch.int32) + noise & -(2**16)).view(torch.float32)
    target.copy_(value)


# ---- 10. Cost ------------------------------------------------------------------------------------


def sft_flops(model, episodes):
    """(FLOPs of one update on these episodes, the paper's 6 N D)."""
    work = add_work([group_work([episode]) for episode in episodes])
    tokens = sum(len(episode.ids) for episode in episodes)
    return pass_flops(model, work, backward=True), 6 * text_weights(model) * tokens


def group_work(group: list[Episode], cached=False, encoded=True) -> Work:
    """The Work of episodes whose prompt is computed once. cached: sampled token by token, where the
    prompt's last token gives the first logits of the whole group; else it begins each episode's own
    part. encoded: their pictures too."""
    prompt = group[0].response_mask.index(1) - (not cached)
    parts = [text_work(prompt, len(episode.ids) - 1, episode.response_tokens - cached)
             for episode in group]
    # Each episode has seen a beginning of the same list.
    pictures = max(len(episode.pictures) for episode in group)
    parts += [text_work(0, prompt, cached), Work(images=pictures, encoded=pictures * encoded)]
    return add_work(parts)


def text_weights(model: LlamaVision) -> int:
    """The paper's N: weights that a token of text meets."""
    return pass_flops(model, text_work(0, 1, 1), adapters=False) // 2


# ---- 11. Data ------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """Names that are drawn with a probability in proportion to their weights."""

    names: list[str]
    weights: list[float]

    def draw(self, rng):
        """One of the names."""
        return rng.choices(self.names, self.weights)[0]


def demonstrations(args, style):
    """The data that the flags of SFT ask for."""
    if args.data:
        return OwnData(read_conversations(args.data, args.task), args.seed)
    visuals = read_mixture("visuals", args.visuals) if args.visuals else None
    return Demonstrations(args.task, read_mixture("rules", args.rules),
                          read_mixture("demonstrators", args.demonstrators), visuals,
                          args.split, args.seed, style)


@dataclass(frozen=True)
class OwnData:
    """The conversations of --data, in another order in every pass. Episode number `index` is a pure
    function of the file, the seed and the index, as that of `Demonstrations`."""

    conversations: list
    seed: int

    def episode(self, tokenizer, index):
        """The one whose turn it is."""
        number, place = divmod(index, len(self.conversations))
        order = shuffled(len(self.conversations), f"data/{self.seed}/{number}")
        return conversation(tokenizer, *self.conversations[order[place]])


@lru_cache(maxsize=2)
def shuffled(count, seed):
    """The numbers below `count` in an order that the seed gives."""
    return random.Random(seed).sample(range(count), count)


def conversation(tokenizer, texts, picture: Path | None = None, system="") -> Episode:
    """The Episode of a user's and an assistant's texts in turn. A picture precedes the first. The
    words of the system stand in the first text where the format has no other place for them."""
    problem = tasks.Problem()
    inside = system and (picture or tokenizer.short)
    problem.prompt = f"{system}\n\n{texts[0]}" if inside else texts[0]
    episode = Episode(problem, pictures=[open_image(picture)] if picture else [])
    episode.append_context(tokenizer.prompt(problem.prompt, bool(picture),
                                            "" if inside else system))
    for i, text in enumerate(texts[1:]):
        if i % 2:
            episode.append_context(tokenizer.turn(text))
        else:
            episode.append_response([*tokenizer.encode(text), tokenizer.eot])
    return episode


def read_conversations(path: str, task: str) -> list:
    """[(texts of user and assistant in turn, path of the picture or None, words of the system)]
    of a file with a JSON object in each line: {"prompt", "response"} (or TRL's "completion"; both
    may be lists of messages) or {"messages": [{"role", "content"}, ...]}, and perhaps "image", a
    path as seen from the file. ValueError that names the line."""
    if not Path(path).is_file():  # a pipe could be read only once
        raise ValueError(f"{path} is no regular file: --data and --eval-data need one.")
    found = []
    for at, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            item, roles = json.loads(line), ["user", "assistant"]
            if not isinstance(item, dict):
                raise ValueError("this is no object")
            messages = item.get("messages")
            if not messages:
                asked, answer = item["prompt"], item.get("completion") or item["response"]
                messages = asked + answer if isinstance(asked, list) else [
                    {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            texts = [message["content"] for message in messages]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError("each message must be a text that is not empty")
            "".join(texts).encode()  # half of a surrogate pair is no text
            first = messages[0]["role"] == "system"
            if [message["role"] for message in messages[first:]] != roles * max(1, len(texts) // 2):
                raise ValueError("the roles must be user and assistant in turn")
            picture = item.get("image") and Path(path).parent / str(item["image"])
            if picture and not (tasks.TASKS[task].pictures and picture.is_file()):
                raise ValueError(f"there is no file {picture}, or --task {task} shows no pictures")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise ValueError(f"{path}, line {at}: {clean(why)}; a line is a JSON object with "
                             '"prompt" and "response", or with "messages".') from None
        found.append((texts[first:], picture or None, texts[0] * first))
    if not found:
        raise ValueError(f"{path} holds no line.")
    return found


def read_mixture(flag, items):
    """["10:3", "11,12,13"] -> Mixture of "10" with weight 3 and "11,12,13" with weight 1.
    ValueError for other weights."""
    names, weights = [], []
    for item in items:
        name, _, weight = item.partition(":")
        try:
            weights.append(float(weight or 1))
        except ValueError:
            raise ValueError(f"--{flag} {item}: the weight behind the colon must be a "
                             "number.") from None
        if not 0 < weights[-1] < 1e6:
            raise ValueError(f"--{flag} {item}: the weight must be positive.")
        names.append(name)
    return Mixture(names, weights)


# ---- 12. Command line ----------------------------------------------------------------------------


def shared_arguments(parser: Parser, **defaults) -> None:
    """The flags that both trainers have; `defaults` holds those that differ."""
    model_arguments(parser)
    g = parser.add_argument_group("length: one of the two; --flops gives two arms equal compute")
    number(g, "--steps", defaults["steps"], 1, 1e8, "optimizer steps")
    number(g, "--flops", 0.0, 0, 1e30, "training FLOPs of this run, rollouts included; 0: --steps")
    g = parser.add_argument_group("optimisation")
    number(g, "--lr", defaults["lr"], 1e-12, 10, "peak learning rate")
    g.add_argument("--optimizer", choices=defaults.get("optimizers", ("adamw", "adamw16")),
                   default="adamw", help="adamw16: weights and state in bfloat16, full fine-tuning "
                   "in little memory")
    g.add_argument("--schedule", choices=("cosine", "constant"), default=defaults["schedule"],
                   help="of the rate after the warm-up")
    number(g, "--lr-warmup", 10, 0, 1e8, "steps of linear learning-rate warm-up")
    number(g, "--lr-end", 0.1, 0, 1, "last learning rate as a share of the peak")
    number(g, "--weight-decay", 0.0, 0, 10, "AdamW's, per step as a share of --lr")
    number(g, "--max-grad-norm", 1.0, 1e-9, 1e9, "gradients are clipped to this norm")
    g.add_argument("--micro-tokens", type=between(int, 1, 1e9), help="tokens per forward pass, a "
                   "prompt counted once for its group: memory, not the result (default: 1048576 "
                   "tiny, 4096 else, which LoRA on the 11B fits into 80 GB)")
    g.add_argument("--micro-batch", type=between(int, 1, 1e6), help="episodes per forward pass, "
                   "beside that; adamw16 adds gradients in bfloat16: 4 or more there (default: "
                   "256)")
    g.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, "
                   "one more forward pass")
    evaluation_arguments(parser)
    g = parser.add_argument_group("run")
    g.add_argument("--out", default=defaults["out"], help="run directory to create")
    g.add_argument("--resume", metavar="RUN", help="continue this run with its own arguments")
    g.add_argument("--or-resume", action="store_true", help="where --out holds a run that was "
                   "begun with these very flags, continue it")
    number(g, "--seed", 0, 0, 2**62, "shifts the training problems, orders and samples")
    number(g, "--save-every", 100, 0, 1e8, "steps between checkpoints besides those at evaluations")
    number(g, "--keep", 2, 1, 1e4, "newest checkpoints to continue from; of older ones the weights "
           "stay where they were evaluated and take less than 2 GB")
    g.add_argument("--preset", choices=defaults.get("presets", ()), help="the study's settings or "
                   "ours for the 11B; other flags win")
    g.add_argument("--dry-run", action="store_true", help="estimate memory and disk, then stop")
    g.add_argument("--device", default="auto", help="auto, cpu or cuda")
    number(g, "--threads", 0, 0, 1024, "CPU threads; 0: torch's choice")


def model_arguments(parser):
    """The flags of the task and of the model."""
    g = parser.add_argument_group("task and model")
    g.add_argument("--task", default="gp-l", choices=list(tasks.TASKS), help="GeneralPoints or "
                   "V-IRL, in text or in pictures")
    g.add_argument("--rule", help="rule that is trained: values of J,Q,K [/target=N][/cards=N], "
                   "for V-IRL absolute or relative (default: the task's)")
    g.add_argument("--visual", help="look that is trained, for tasks in pictures (default: the "
                   "task's)")
    g.add_argument("--train", nargs="+", choices=list(PARTS), help="parts that are trained "
                   "(default: the decoder; without LoRA and with pictures all)")
    g.add_argument("--model", default="tiny", help="tiny (the shipped base of the task), or a "
                   "model directory")
    g.add_argument("--init", help="start from this run's weights instead of --model's")
    number(g, "--lora-rank", 0, 0, 4096, "rank of LoRA on all linear layers of the trained parts; "
           "0: full fine-tuning")
    number(g, "--lora-alpha", 32.0, 1e-3, 1e5, "LoRA scale is alpha / rank")
    number(g, "--attempts", 1, 1, 100, "answers an episode may have (a walk: at each position), "
           "with the verifier's words between")
    g.add_argument("--max-new-tokens", type=between(int, 1, 1e5), help="tokens per answer "
                   "(default: 64 tiny, 256 else)")


def evaluation_arguments(parser):
    """The flags of the evaluations of a run."""
    g = parser.add_argument_group("evaluation along the way")
    number(g, "--evals", 2, 0, 1e4, "evaluations spread over the run, start and end included; 1: "
           "the end")
    number(g, "--eval-n", 200, 1, 1e5, "held-out problems")
    g.add_argument("--eval-split", choices=("val", "test"), default="val", help="val chooses "
                   "settings, test is for claims")
    g.add_argument("--eval-suite", choices=tasks.suite_names(), help="suite to evaluate (default: "
                   "the task's)")
    g.add_argument("--eval-rows", nargs="+", choices=list(ROWS), help="only these rows of it "
                   "(default: all of them at the end)")
    g.add_argument("--eval-teacher", metavar="KIND", help="measure -log p of this demonstrator's "
                   "answers (default: of SFT the first of --demonstrators)")
    g.add_argument("--eval-moved", action="store_true", help="measure KL(policy || start) on the "
                   "policy's answers; without LoRA the start is loaded as a second model")
    number(g, "--rollout-batch", 256, 1, 1e6, "episodes played side by side: memory, and "
           "which answers are drawn, not their distribution")


def finish_arguments(parser: Parser, argv: list[str] | None, presets=None) -> argparse.Namespace:
    """Parse, take the arguments of a resumed run, and check as much as can be checked before
    anything is written."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.preset and not args.resume:
        args = parser.parse_args([*presets[args.preset].split(), *argv])
    if args.resume:
        flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
        args = resumed_arguments(parser, args, flags)
    args.rule = args.rule or tasks.TASKS[args.task].rule
    tasks.make(args.task, args.rule, args.visual, tile=1120)  # nothing is drawn
    if args.train and not tasks.TASKS[args.task].pictures and args.train != ["decoder"]:
        raise ValueError(f"--train: {args.task} shows no pictures, so only the decoder can be "
                         "trained.")
    known = tasks.TASKS[args.task].problem.DEMONSTRATORS
    if args.eval_teacher not in (None, *known):
        raise ValueError(f"--eval-teacher {args.eval_teacher}: choose from "
                         f"{', '.join(known)}.")
    if not args.resume:
        fresh = getattr(args, "fresh", False)
        start = None if fresh else find_model(args.init or args.model, args.task)
        args.init_path = start and os.path.abspath(start)
    return args


def or_resume(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """The last of parse_args: with --dry-run the estimate, and no return. Else the arguments of the
    run in --out where --or-resume asks for it, or the same. ValueError that names the flags in
    which that run differs: its results must not pass for new ones."""
    if args.dry_run:
        run_script("memory.py", "--run", json.dumps(vars(args)))
    if not args.or_resume or args.resume or not (Path(args.out) / "args.json").is_file():
        return args
    stored = vars(read_arguments(parser, args.out))
    free = {"out", "resume", "or_resume", "init", "model", *FREE} - {"steps", "flops"}
    if read_start(args.out).get("weights") == start_checksums(args.init_path):
        free.add("init_path")  # wherever they lie now
    if args.max_new_tokens is None and stored["max_new_tokens"] in (64, 256):
        free.add("max_new_tokens")  # the defaults
    differ = [f"--{name.replace('_', '-')} {stored[name]}, not {value}"
              for name, value in vars(args).items() if name not in free and stored[name] != value]
    if differ:
        raise ValueError(f"{args.out} was begun with other settings ({'; '.join(differ)}): take "
                         "another directory, or remove that one.")
    return argparse.Namespace(**stored | {"resume": args.out, "out": args.out,
                                          "device": args.device, "threads": args.threads})


# What --resume may change, less the last.
FREE = ("steps", "flops", "micro_tokens", "micro_batch", "rollout_batch", "recompute", "keep",
        "save_every", "device", "threads", "dry_run", "preset")
# Flags that the runs of earlier versions lack; their defaults are what those versions did.
NEWER = ("data", "eval_data", "loss", "clip_eps_high", "ratio", "ratio_cap", "mask_truncated")


def resumed_arguments(parser, given, flags):
    """The arguments of the run that --resume names, with those that may change taken from the
    command line, whose arguments are `given` and whose flags `flags`."""
    if given.init:
        raise ValueError("--init starts a run and --resume continues one: give only one of them.")
    if not (Path(given.resume) / "args.json").is_file():
        raise ValueError(f"{given.resume} holds no run (no args.json); --resume needs a run "
                         "directory.")
    changed = {flag[2:].replace("-", "_") for flag in flags} - {"resume"}
    if wrong := changed.difference(FREE[:-1]):
        raise ValueError("--resume takes the arguments of the run it continues: leave out --"
                         f"{min(wrong).replace('_', '-')}. Only {', '.join(FREE[:-1])} may change; "
                         f"for others start a new run with --init {given.resume}.")
    stored = vars(read_arguments(parser, given.resume))
    for name in changed & {"steps", "flops"}:
        if not 0 < stored[name] < getattr(given, name):
            raise ValueError(f"--{name} can only grow when a run is resumed, from {stored[name]}.")
    changes = {name: getattr(given, name) for name in changed}
    return argparse.Namespace(**stored | changes | {"resume": given.resume, "out": given.resume})


def read_arguments(parser, run):
    """The arguments in a run's args.json: read as flags, so that each is checked as a flag is."""
    path = Path(run) / "args.json"
    stored, known = read_json(path), {"init_path", *vars(parser.parse_args([]))}
    stored = stored if isinstance(stored, dict) else {}
    if differ := sorted((known ^ stored.keys()).difference(FREE, NEWER)):
        raise ValueError(f"{path} was not written by {parser.prog} as it is now (they differ in "
                         f"{', '.join(differ[:3])}); continue the run with the script that began "
                         "it, or name a flag that you have added in NEWER of train_sft.py.")
    init_path, argv = stored.pop("init_path"), []
    for name, value in stored.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            argv += [flag, *map(str, value)]
        elif value not in (parser.get_default(name), None):
            argv.append(flag if value is True else f"{flag}={value}")
    try:
        args = parser.parse_args(argv)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    args.init_path = init_path if isinstance(init_path, str) else None
    for name, value in (stored | {"init_path": init_path}).items():
        if getattr(args, name) != value:
            raise ValueError(f"{path}: {name} cannot be {json.dumps(value)[:60]}.")
    return args


def mixture_arguments(parser, demonstrators):
    """The flags of SFT; `demonstrators` is the default mixture."""
    g = parser.add_argument_group("supervised fine-tuning")
    number(g, "--batch", 256, 1, 1e5, "demonstrations per step")
    g.add_argument("--data", metavar="FILE", help="learn from your own lines instead of "
                   "demonstrators: {\"prompt\", \"response\"} or {\"messages\"}, and perhaps "
                   "{\"image\"}, in JSON")
    g.add_argument("--eval-data", metavar="FILE", help="such lines that are not learned: their "
                   "eval_loss, at each evaluation")
    g.add_argument("--loss", choices=("nll", "dft"), default="nll", help="dft: each token's -log p "
                   "times its p (arXiv 2508.05629)")
    g.add_argument("--rules", nargs="+", metavar="RULE:WEIGHT", help="mixture of rules (default: "
                   "--rule)")
    g.add_argument("--visuals", nargs="+", metavar="LOOK:WEIGHT", help="mixture of looks (default: "
                   "--visual)")
    known = "; ".join(f"{name}: {', '.join(task.problem.DEMONSTRATORS)}"
                      for name, task in tasks.TASKS.items())
    g.add_argument("--demonstrators", nargs="+", metavar="KIND:WEIGHT", default=demonstrators,
                   help=f"mixture of {known} (default: {' '.join(demonstrators)})")


def check_mixtures(args):
    """Fill in the defaults of the mixtures and make one problem of each part. ValueError for a
    wrong one."""
    mixed = args.rules or args.visuals or args.demonstrators != ["expert"]
    if args.data and mixed and not args.resume:
        raise ValueError("--data takes the place of --demonstrators, --rules and --visuals: leave "
                         "these out, or --data.")
    args.rules = args.rules or [args.rule]
    args.visuals = args.visuals or ([args.visual] if args.visual else None)
    for rule in read_mixture("rules", args.rules).names:
        tasks.make(args.task, rule, split=args.split, tile=1120)
    for visual in read_mixture("visuals", args.visuals or []).names:
        tasks.make(args.task, args.rule, visual, args.split, tile=1120)
    known = tasks.TASKS[args.task].problem.DEMONSTRATORS
    for name in ("data", "eval_data"):
        if path := vars(args)[name]:
            vars(args)[name] = os.path.abspath(path)
            read_conversations(path, args.task)
    for kind in read_mixture("demonstrators", args.demonstrators).names:
        if kind not in known:
            raise ValueError(f"--demonstrators {kind}: choose from {', '.join(known)}.")
        args.eval_teacher = args.eval_teacher or (None if args.data else kind)


def metrics_help(metrics: dict[str, str]) -> str:
    """The end of --help: the meaning of every name in a log line."""
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in metrics.items())
    return f"names in a log line, in metrics.jsonl and metrics.csv: {meanings}"


PAPER = "--batch 128 --optimizer adamw16 --lr-end 0 "  # with bfloat16 in place of several GPUs
PRESETS = {
    "paper": PAPER + "--steps 4000 --lr 1e-6 --lr-warmup 400",
    "paper-pictures": PAPER + "--steps 4000 --lr 5e-7 --lr-warmup 400",
    "paper-walks": PAPER + "--steps 250 --lr 1e-6 --lr-warmup 25",
    "ours": "--lora-rank 16 --batch 32 --steps 100 --lr 2e-4 --evals 3",
}


def parse_args(argv=None):
    """Command line of supervised fine-tuning."""
    parser = Parser("Supervised fine-tuning on demonstrations.")
    parser.epilog = metrics_help(METRICS)
    shared_arguments(parser, steps=300, lr=3e-4, schedule="cosine", out="runs/sft", presets=PRESETS)
    mixture_arguments(parser, ["expert"])
    parser.set_defaults(split="train")
    args = finish_arguments(parser, argv, PRESETS)
    check_mixtures(args)
    return or_resume(parser, args)


if __name__ == "__main__":
    run_main(main)
