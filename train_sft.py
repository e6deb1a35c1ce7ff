"""Supervised fine-tuning, and what both trainers share.

    python train_sft.py --task gp-l --out runs/sft                    # expert answers under the training rule
    python train_sft.py --task gp-l --fresh --rules 10:2 11,12,13:3 --demonstrators expert:2 retry --out runs/base  # from scratch

Contents
  1. Run directory   arguments, metrics, checkpoints that resume bit for bit, stopping cleanly
  2. Progress        schedule, budget, the line that a step prints
  3. Data            problems and demonstrators -> token ids and the mask of what is learned
  4. The loss        -log p of the response and its stop token, one normaliser for the whole batch
  5. Training loop and command line
"""

import argparse
import fcntl
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

import tasks
from evaluate import (ROWS, Episode, Parser, answer_length, check_limits, clean, device_and_dtype, evaluate, find_model,
                      micro_batches, run_main, seen_by, shown_to, summary, to_batch)
from model import (PARTS, SIZES, LlamaVision, add_lora, count_parameters, image_flops, init_weights, load_model, merge_lora, read_json,
                   save_adapter, save_model, text_flops, train_tokenizer, training_flops, write_atomically, write_json)

# ---------------------------------------------------------------- 1. Run directory


CHECKSUMS = "checksums.json"
LOCKS = {}  # of this process's runs, held until it ends


class Run:
    """runs/NAME: everything that one run of a script leaves behind.

    args.json          its arguments                      metrics.jsonl   one JSON object a step
    evals/NNNNNN.json  an evaluation, hand by hand        samples/        episodes in plain text (RL)
    step-NNNNNN/       a checkpoint: a model directory as the hub has it (or an adapter as PEFT has it), the checksums of
                       its files and, in the two newest, state.pt: optimizer, step, random states; plain values only
    latest             the name of the newest complete checkpoint, written last
    start.json         sizes and checksums (of the last MB) of the weights that it began from
    source/            a copy of the five files and their word lists, since people edit them
    Whatever is written under another name first (.NAME.tmp) and renamed is either whole or absent.
    """

    def __init__(self, args):
        plain = Path(args.out).name and not os.path.islink(args.out)  # a link or "." cannot be renamed to
        self.path, self.stopping, self.saved, self.warned = Path(args.out if plain else os.path.realpath(args.out)), False, -1, {}
        if args.resume:
            self.lock()
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} is there already and not empty; choose another --out, or go on with --resume {self.path}.")

    def open(self, args):
        """Write what a run begins with (all at once, once the model is there), or clear what a killed one left."""
        if not args.resume:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(self.path) as fresh:
                (fresh / "source" / "assets").mkdir(parents=True)
                here = Path(__file__).parent
                for path in [here / f"{n}.py" for n in ("train_sft", "train_rl", "evaluate", "model", "tasks")] + [*here.glob("assets/*.json")]:
                    shutil.copy(path, fresh / "source" / path.relative_to(here))
                write_json(fresh / "args.json", vars(args))
            self.lock()
        for stale in self.path.glob(".*.tmp"):
            shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
        for folder in ("evals", "samples"):
            (self.path / folder).mkdir(exist_ok=True)

    def lock(self):
        """Keep other processes from continuing this run; the lock ends with the process, however it ends."""
        file = open(self.path / "args.json")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS[str(self.path.absolute())] = file
        except BlockingIOError:
            if str(self.path.absolute()) not in LOCKS:
                raise ValueError(f"{self.path} is being written by another process; wait for it or stop it.") from None

    def catch_signals(self):
        """Ctrl-C and SIGTERM finish the step and save; a second one exits at once."""
        def handler(number, frame):
            if self.stopping:
                os._exit(130)
            self.stopping = True
            print("stopping after this step; once more to exit at once", file=sys.stderr, flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def log(self, record):
        """Append one record to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def warn(self, key, step, sentence, every=50):
        """Print a warning, each kind at most once in `every` steps."""
        if step >= self.warned.get(key, step):
            self.warned[key] = step + every
            print(f"warning: step {step}: {sentence}", file=sys.stderr, flush=True)

    def save(self, model, tokenizer, state, base=None):
        """A checkpoint of step state["step"]: an adapter when `base` names what it belongs to, else all weights."""
        name = f"step-{state['step']:06d}"
        try:
            with replaced(self.path / name) as fresh:
                save_adapter(model, fresh, base) if base else save_model(model, tokenizer, fresh)
                torch.save(state, fresh / "state.pt")
                write_json(fresh / CHECKSUMS, checksums(fresh))
            self.point_to(name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
            raise ValueError(f"the checkpoint of step {state['step']} could not be written to {self.path} ({str(error)[:120]}); "
                             f"those before it are as they were. Make room, then --resume {self.path}.") from None
        self.saved = state["step"]
        for old in self.states()[:-2]:  # two to continue from; of the others the weights
            old.unlink()

    def states(self):
        """The files state.pt of the run's checkpoints, oldest first."""
        return sorted(self.path.glob("step-[0-9]*/state.pt"), key=lambda path: int(path.parent.name[5:]))

    def point_to(self, name):
        """Make a checkpoint the one that others find."""
        pointer = self.path / "latest"
        if not pointer.is_file() or pointer.read_bytes() != f"{name}\n".encode():
            write_atomically(pointer, lambda p: p.write_text(name + "\n"))

    def resume_point(self):
        """(directory, state) of the newest checkpoint that is whole; (None, None) if none has been written yet.

        What the run wrote after it is taken back: later lines of the metrics and later evaluations come again.
        """
        directory, state = None, None
        for path in reversed(self.states()):
            try:
                written = read_json(path.parent / CHECKSUMS)
                if "state.pt" not in written or written != checksums(path.parent, written):
                    raise ValueError("a file is not as it was written")
                directory, state = path.parent, torch.load(path, map_location="cpu", weights_only=True)
                break
            except Exception as error:  # torch.load alone has half a dozen kinds for a damaged file
                print(f"{path.parent} is damaged ({clean(error)[:120]}); going back to the checkpoint before it.", file=sys.stderr)
        if state is None and any(self.path.glob("step-*")):
            raise ValueError(f"no checkpoint of {self.path} can be continued; start a new run with --init and one of its "
                             f"step-NNNNNN directories, or --model.")
        if directory:
            self.point_to(directory.name)
        self.saved = step = state["step"] if state else 0
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text("utf-8", "replace").split("\n") if metrics.is_file() else []
        kept = [line for line in lines if step_of(line) <= step]
        write_atomically(metrics, lambda p: p.write_text("".join(line + "\n" for line in kept)))
        for path in [*self.path.glob("evals/*.json"), *self.path.glob("samples/*.json")]:
            if path.stem.isdecimal() and int(path.stem) > step:
                path.unlink()
        return directory, state

    @contextmanager
    def keeping(self, step, episodes):
        """A loss or gradient that is not finite ends the run here, and its batch is kept for a look."""
        try:
            yield
        except FloatingPointError as error:
            path = self.path / f"not-finite-{step:06d}.json"
            write_json(path, [{"prompt": e.problem.prompt, "turns": e.turns, "ids": e.ids, "response_mask": e.response_mask,
                               "log_probs": e.log_probs} for e in episodes])
            start = self.path if self.saved > 0 else "and the same start"
            raise ValueError(f"step {step}: {error}, so this update was not made; its batch is in {path}. Start a new run with "
                             f"--init {start} and a lower --lr or --max-grad-norm.") from None


@contextmanager
def replaced(path):
    """A new directory that takes the place of `path` when the block ends, and is removed when the block fails."""
    fresh = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def checksums(directory, names=None, most=None):
    """{file name: [bytes, CRC-32]} of files in a directory, by default of all; with `most`, of their last bytes only."""
    found = {}
    for name in sorted(names or (path.name for path in directory.iterdir())):
        with open(directory / name, "rb") as file:
            size, crc = os.fstat(file.fileno()).st_size, 0
            file.seek(max(0, size - most) if most else 0)
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        found[name] = [size, crc]
    return found


def step_of(line):
    """The step of a line of the metrics; infinity for one that was cut off or damaged."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


# ---------------------------------------------------------------- 2. Progress


class Progress:
    """How far a run is: by --steps, or by --flops when a budget is given (so that two arms spend the same)."""

    def __init__(self, args):
        self.args, self.step, self.flops, self.flops_paper = args, 0, 0, 0
        self.seconds, self.eval_seconds = 0.0, 0.0
        self.evals_done, self.idle, self.stuck = 0, {}, ""

    def share(self):
        """0 at the start, 1 at the end."""
        return self.flops / self.args.flops if self.args.flops else self.step / self.args.steps

    def done(self):
        """Whether the budget is spent."""
        return self.share() >= 1

    def lr(self):
        """Learning rate of the next step: linear warm-up over --lr-warmup steps, then cosine (or constant)."""
        a = self.args
        warm = min(1.0, (self.step + 1) / max(1, a.lr_warmup))
        if a.schedule == "constant":
            return a.lr * warm
        return a.lr * warm * (a.lr_end + (1 - a.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.share()))))

    def eval_due(self):
        """Whether the next of --evals evaluations (start and end included; a single one: the end) is reached."""
        if self.evals_done >= self.args.evals:
            return False
        if self.args.evals == 1:
            return self.done()
        return self.done() or self.share() * (self.args.evals - 1) >= self.evals_done

    def add(self, flops, flops_paper, seconds):
        """Count one finished step."""
        self.step, self.flops, self.flops_paper = self.step + 1, self.flops + flops, self.flops_paper + flops_paper
        self.seconds += seconds

    def wasted(self, what, wasted, sentence, limit=50):
        """Note whether a step was wasted in some way; `limit` of them in a row end the run, after a save."""
        self.idle[what] = self.idle.get(what, 0) + 1 if wasted else 0
        if self.idle[what] and self.idle[what] % limit == 0:
            self.stuck = f"stopped after {limit} steps in a row in which {sentence}"

    def line(self, record):
        """What the terminal shows of a step."""
        left = self.seconds / max(self.share(), 1e-9) * (1 - min(1, self.share()))
        left += max(0, self.args.evals - self.evals_done) * self.eval_seconds / max(1, self.evals_done)
        words = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        return f"step {self.step:4d} {100 * min(1, self.share()):3.0f}% left {left // 60:.0f}:{left % 60:02.0f} | {words}"

    def state(self):
        """Plain values for a checkpoint."""
        return {k: getattr(self, k) for k in ("step", "flops", "flops_paper", "seconds", "eval_seconds", "evals_done", "idle")}

    def restore(self, state):
        """The reverse of `state`."""
        for name in self.state():
            setattr(self, name, state[name])


def random_states(generator):
    """Every random state that training depends on; problems need none, they are made from their index."""
    states = {"torch": torch.get_rng_state(), "sampling": generator.get_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_states(states, generator):
    """The reverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    generator.set_state(states["sampling"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def evaluate_run(run, model, tokenizer, progress, args):
    """Evaluate the model as it is now, write evals/NNNNNN.json and print one line."""
    only = args.eval_rows or (None if progress.done() else ROWS)  # on the way what the curves show, at the end everything
    result = evaluate(model, tokenizer, args.eval_suite or args.task, args.eval_n, args.attempts,
                      args.eval_split, args.max_new_tokens, args.rows, only=only)
    result |= {"step": progress.step, "flops": progress.flops, "flops_paper": progress.flops_paper,
               "seconds": round(progress.seconds, 2)}
    write_json(run.path / "evals" / f"{progress.step:06d}.json", result)
    scores = summary(result)
    print(f"  eval at step {progress.step}, {args.eval_n} held-out problems, first attempt: " + ", ".join(
        f"{row} {100 * scores[f'{row}/greedy/first']:.1f} greedy {100 * scores[f'{row}/sampled/first']:.1f} sampled"
        for row in result["rows"]), flush=True)
    warn_truncated(run, progress, "held-out", result["truncated"], args)
    progress.evals_done, progress.eval_seconds = progress.evals_done + 1, progress.eval_seconds + result["eval_seconds"]
    return scores


def warn_truncated(run, progress, which, share, args):
    """Warn when many answers were cut off, for a cut answer is a wrong one."""
    if share > 0.3:
        run.warn(which, progress.step, f"{100 * share:.0f} % of the {which} answers were cut off at --max-new-tokens "
                 f"{args.max_new_tokens}; raise it, or begin with a longer SFT warm-up.")


def set_up(args):
    """Model, tokenizer, optimizer, sampling generator, progress and run of a training script, new or resumed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args.device)
    run, progress = Run(args), Progress(args)
    generator = torch.Generator(device).manual_seed(args.seed)
    start, state = run.resume_point() if args.resume else (None, None)
    if args.fresh and not start:
        model, tokenizer = fresh_model(args)
        model = model.to(device, torch.bfloat16 if args.optimizer == "adamw16" else torch.float32)
    else:
        dtype = torch.bfloat16 if args.optimizer == "adamw16" else dtype if args.lora_rank else torch.float32
        model, tokenizer = load_model(start or args.init_path, dtype, device)
    args.max_new_tokens = args.max_new_tokens or answer_length(tokenizer)
    shown = getattr(args, "visuals", None)
    looks = parse_weights(shown, "visuals", partial(check_look, task=args.task))[0] if shown else [args.visual]
    for visual in looks:  # legible at this model's tile size?
        tasks.make(args.task, args.rule, visual, "train", 0, **shown_to(model, tokenizer))
    if getattr(args, "fresh_eyes", False) and not start:
        open_eyes(model, args.seed)
    if not start:
        merge_lora(model)  # an adapter that --init brings belongs to the start, not to what is trained now
    if args.lora_rank and not any(".lora_" in name for name, _ in model.named_parameters()):
        add_lora(model, args.lora_rank, args.lora_alpha, tuple(PARTS[part] for part in trained_parts(args)))
    model.recompute(args.recompute)
    optimizer = make_optimizer(model, args)
    run.open(args)
    check_start(run, args)
    if start:
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError):
            raise ValueError(f"{start} holds the state of another optimizer or model than {run.path}/args.json asks for.") from None
        restore_random_states(state["random"], generator)
        progress.restore(state["progress"])
    sizes = count_parameters(model)
    print(f"{clean(run.path)}: {sizes['decoder']:,} decoder + {sizes['vision']:,} vision parameters, {sizes['trained']:,} "
          f"trained ({'LoRA rank %d' % args.lora_rank if args.lora_rank else 'full fine-tuning'}), {device}, "
          f"{torch.get_num_threads()} threads" + (f", continued at step {progress.step}" if args.resume else ""), flush=True)
    run.catch_signals()
    return model, tokenizer, optimizer, generator, progress, run


def check_start(run, args):
    """A resumed run needs the very weights it began from where these are its base or its reference."""
    weights = [path.name for path in Path(args.init_path).glob("*.safetensors")] if args.init_path else []
    now, kept = weights and checksums(Path(args.init_path), weights, most=1 << 20), run.path / "start.json"
    if not args.resume:
        write_json(kept, now)
    elif (args.lora_rank or getattr(args, "kl_coef", 0)) and kept.exists() and read_json(kept) != now:
        raise ValueError(f"{args.init_path} holds other weights than when {run.path} began from it; put those back to continue.")


def trained_parts(args):
    """The names in PARTS of what is trained: --train, or by default the decoder, and in full fine-tuning on pictures all."""
    return args.train or (list(PARTS) if tasks.pictures(args.task) and not args.lora_rank else ["decoder"])


def open_eyes(model, seed):
    """Random weights for tower, projector and cross layers: eyes for a model that has learned to read."""
    fresh = init_weights(LlamaVision(model.config), seed).state_dict()
    crossing = tuple(f"language_model.model.layers.{i}." for i in model.config.text.cross_attention_layers)
    eyes = {name: t for name, t in fresh.items() if name.startswith((PARTS["tower"], PARTS["projector"], *crossing))}
    model.load_state_dict(eyes, strict=False)


def freeze_unused(model, args):
    """Freeze the parts that --train leaves out. Text alone leaves out the cross layers too: they would get no gradient."""
    parts = trained_parts(args)
    model.vision_model.requires_grad_("tower" in parts)
    model.multi_modal_projector.requires_grad_("projector" in parts)
    model.language_model.requires_grad_("decoder" in parts)
    if not tasks.pictures(args.task):
        for i in model.config.text.cross_attention_layers:
            model.language_model.model.layers[i].requires_grad_(False)


def make_optimizer(model, args):
    """AdamW on what is trained: the adapters, or with rank 0 all of the parts that --train names.

    --optimizer muon is for the layers' matrices and leaves the rest to AdamW: about twice as fast where a model learns from
    nothing. --optimizer adamw16: see AdamW16.
    """
    if not args.lora_rank:
        freeze_unused(model, args)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter would be trained; give --lora-rank 1 or more, or 0 for full fine-tuning.")
    adamw = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(trained.values(), **adamw)
    if args.optimizer == "adamw16":
        return AdamW16(trained.values(), **adamw)
    matrices = [name for name, p in trained.items() if p.dim() == 2 and (".layers." in name or name.startswith("multi_modal"))]
    if args.lora_rank:
        raise ValueError("--optimizer muon is for training from scratch: leave out --lora-rank, or use adamw.")
    return Pair(Muon([trained[n] for n in matrices], lr=args.lr, weight_decay=args.weight_decay),
                torch.optim.AdamW([p for n, p in trained.items() if n not in matrices], **adamw))


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is the nearest orthogonal matrix, about: all directions are learned at one speed (Jordan et al.,
    2024, github.com/KellerJordan/Muon). Five steps of a Newton-Schulz iteration in the weights' own type; torch.optim.Muon takes
    bfloat16, which a CPU without it computes fifteen times slower. The size of an update is AdamW's at the same rate: RMS 0.2.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(mean, group["momentum"])
                x = x if x.shape[0] <= x.shape[1] else x.T
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                x = x if p.shape[0] <= p.shape[1] else x.T
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


class AdamW16(torch.optim.Optimizer):
    """AdamW with everything in bfloat16: 8 bytes a parameter with its gradient instead of 16 (or 18 with master weights).

    The step is computed in float32, piece by piece; weight and second moment are then rounded up or down at random, the
    nearer the likelier (the first moment to nearest). Rounded to nearest, a step below bfloat16's spacing, 1/256 of the
    value, would be lost every time, and a slow moment would never move (Zamirai et al., arXiv 2010.06192).
    """

    def __init__(self, params, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["step"] += 1
                t, all_of = state["step"].item(), (p.data, p.grad, state["m"], state["v"])
                for w, g, m16, v16 in zip(*(x.reshape(-1).split(2**24) for x in all_of)):  # 0.5 GB of float32 at a time
                    grad = g.float()
                    m = m16.float().lerp_(grad, 1 - beta1)
                    v = v16.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                    change = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt_() + group["eps"])
                    round_at_random(w, w.float().mul_(1 - lr * group["weight_decay"]).sub_(change, alpha=lr))
                    m16.copy_(m)
                    round_at_random(v16, v)


def round_at_random(target, value):
    """Write float32 `value` into `target`; for bfloat16 up or down at random so that the mean is `value`."""
    if target.dtype == torch.bfloat16:  # its bits are the upper half of float32's: noise in the lower half carries over
        noise = torch.randint_like(value, 2**16, dtype=torch.int32)
        value = (value.view(torch.int32) + noise & -(2**16)).view(torch.float32)
    target.copy_(value)


class Pair:
    """Two optimizers that are stepped and saved as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        """The groups of both."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        """Step both."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        """Clear the gradients of both."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        """Both states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        """The reverse."""
        for part, own in zip(self.parts, state["parts"]):
            part.load_state_dict(own)


def save_run(run, model, tokenizer, optimizer, generator, progress, args):
    """Write a checkpoint that `--resume` continues from bit for bit."""
    run.save(model, tokenizer, {"step": progress.step, "optimizer": optimizer.state_dict(),
                                "random": random_states(generator), "progress": progress.state()},
             args.init_path if args.lora_rank else None)


def finish(run, model, tokenizer, optimizer, generator, progress, args):
    """Save what no checkpoint has yet, and say how the run ended. ValueError when it ended because it had become useless."""
    if run.saved < progress.step:
        save_run(run, model, tokenizer, optimizer, generator, progress, args)
    if progress.stuck:
        raise ValueError(progress.stuck)
    print(f"stopped at step {progress.step}; go on with --resume {clean(run.path)}" if run.stopping and not progress.done() else
          f"done: {clean(run.path)}", flush=True)


def update(model, optimizer, lr, max_grad_norm, progress):
    """Clip the gradient, take one step. Returns the norm before clipping.

    FloatingPointError before anything moves when the norm is not finite. Updates that move nothing (a rate too small for the
    weights' precision, or gradients of 0) are noted, and end the run when they go on.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient is not finite")
    for group in optimizer.param_groups:
        group["lr"] = lr
    fingerprint = lambda: torch.stack([p.detach().sum(dtype=torch.float64) for p in trained])
    before = fingerprint()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.wasted("update", torch.equal(before, fingerprint()), f"no trained parameter moved (--lr {lr:g}, gradient norm "
                    f"{norm:g}): raise --lr, or see why the loss has no gradient.", limit=10)
    return norm


# ---------------------------------------------------------------- 3. Data


def parse_weights(items, flag, check):
    """["10:3", "11,12,13"] -> (["10", "11,12,13"], [3.0, 1.0]). check(name) raises ValueError for a name it does not know."""
    names, weights = [], []
    for item in items:
        name, _, weight = item.partition(":")
        check(name)
        try:
            weights.append(float(weight or 1))
        except ValueError:
            raise ValueError(f"--{flag} {clean(item)}: the weight behind the colon must be a number.") from None
        if not 0 < weights[-1] < 1e6:
            raise ValueError(f"--{flag} {clean(item)}: the weight must be positive.")
        names.append(name)
    return names, weights


def check_rule(text, task="gp-l"):
    """ValueError for a rule text that cannot be read."""
    tasks.parse_turns(text) if tasks.walks(task) else tasks.parse_rule(tasks.fill_rule(text, random.Random(0)))


def check_kind(name, task="gp-l"):
    """ValueError for an unknown demonstrator."""
    if name not in tasks.kinds(task):
        raise ValueError(f"--demonstrators {clean(name)}: choose from {', '.join(tasks.kinds(task))}.")


def check_look(text, task="gp-vl"):
    """ValueError for the text of a look that cannot be read."""
    look = tasks.Scene if tasks.walks(task) else tasks.Look
    look.parse(look.fill(text, random.Random(0)))


def draw(args, rng):
    """A rule, a demonstrator and a look (None for a task in text) of the mixture."""
    parts = [(args.rules, "rules", partial(check_rule, task=args.task)),
             (args.demonstrators, "demonstrators", partial(check_kind, task=args.task))]
    if args.visuals:
        parts.append((args.visuals, "visuals", partial(check_look, task=args.task)))
    return [*(rng.choices(*parse_weights(*part))[0] for part in parts), None][:3]


def demonstration(args, model, tokenizer, index):
    """The training episode number `index`: a pure function of the arguments, so a resumed run needs no data state."""
    rng = random.Random(f"demonstrator/{args.seed}/{index}")
    rule, kind, visual = draw(args, rng)
    problem = tasks.make(args.task, rule, visual, args.split, index, attempts=2, seed=args.seed, **shown_to(model, tokenizer))
    return demonstrated_episode(tokenizer, problem, problem.demonstrate(kind, rng)[::2])


def demonstrated_episode(tokenizer, problem, responses):
    """A demonstrator's responses, and the verifier's words between them, as an Episode whose mask marks the responses and
    their stop tokens. The problem has to allow as many attempts as the demonstrator needs, which is at most two."""
    episode = Episode(problem).open(tokenizer)
    for i, response in enumerate(responses, 1):
        episode.respond(tokenizer.encode(response) + [tokenizer.eot])
        if i < len(responses):
            episode.judge(tokenizer, response)
    return episode


def fresh_model(args):
    """A tokenizer learned from the mixture's own texts, and random weights to go with it."""
    texts = []
    for index in range(2000):
        rng = random.Random(f"tokenizer/{index}")
        rule, kind, visual = draw(args, rng)
        problem = tasks.make(args.task, rule, visual, args.split, index, style="short")
        texts += [problem.prompt, *problem.demonstrate(kind, rng)]
    tokenizer = train_tokenizer(texts, SIZES[args.model].text.vocab_size)
    return init_weights(LlamaVision(SIZES[args.model]), args.seed), tokenizer


# ---------------------------------------------------------------- 4. The loss


def sft_backward(model, episodes, pad, size):
    """Gradients of the mean of -log p over all response tokens of the batch, in micro-batches of `size` episodes.

    The normaliser is the whole batch's token count, so any `size` gives the same gradient. Returns (loss, tokens).
    """
    tokens, loss = sum(sum(e.response_mask) for e in episodes), 0.0
    for part in micro_batches(episodes, size):
        ids, chosen, _ = to_batch(part, pad, model.device)
        log_probs = model.log_probs(ids, chosen, image=seen_by(model, part))
        part_loss = -log_probs.sum() / tokens
        part_loss.backward()
        loss += part_loss.item()
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not finite")
    return loss, tokens


def batch_flops(model, episodes, args):
    """(FLOPs of one update on these episodes, the paper's 6 N D). A token counts the attention to the one picture that it sees, not
    what a mask hides of the others."""
    forward = sum(text_flops(model.config, 0, len(e.ids) - 1, sum(e.response_mask), bool(e.pictures)) for e in episodes)
    weights, pictures = text_flops(model.config, 0, 1, 1) // 2, sum(len(e.pictures) for e in episodes)
    return (training_flops(forward, args.lora_rank > 0, args.recompute) + pictures * training_image_flops(model, args),
            6 * weights * sum(len(e.ids) for e in episodes))


def training_image_flops(model, args, encoded=False):
    """FLOPs of one image in a training pass: the tower's forward, and its backward if it is trained, and of what follows it.
    encoded: a rollout has encoded it already, which serves here too unless tower or projector are trained."""
    tower, rest = image_flops(model.config)
    learns = any(p.requires_grad for p in model.vision_model.parameters())
    cost = lambda forward: training_flops(forward, args.lora_rank > 0, args.recompute)
    return (cost(tower) if learns else tower * (model.learns_to_see or not encoded)) + cost(rest)


# ---------------------------------------------------------------- 5. Training loop and command line


def main(argv=None):
    """Train; returns the scores of the last evaluation."""
    args = parse_args(argv)
    model, tokenizer, optimizer, generator, progress, run = set_up(args)
    scores = {}
    if progress.eval_due():
        scores = evaluate_run(run, model, tokenizer, progress, args)
    while not (progress.done() or progress.stuck or run.stopping):
        began, lr, first = time.time(), progress.lr(), progress.step * args.batch
        episodes = [demonstration(args, model, tokenizer, first + i) for i in range(args.batch)]
        with run.keeping(progress.step + 1, episodes):
            loss, tokens = sft_backward(model, episodes, tokenizer.pad, args.micro_batch)
            norm = update(model, optimizer, lr, args.max_grad_norm, progress)
        progress.add(*batch_flops(model, episodes, args), time.time() - began)
        record = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens, "seconds": time.time() - began}
        print(progress.line(record), flush=True)
        due = progress.eval_due()
        if due:
            scores = evaluate_run(run, model, tokenizer, progress, args)
        run.log({"step": progress.step, "flops": progress.flops, **record, **(scores if due else {})})
        if due or (args.save_every and progress.step % args.save_every == 0):
            save_run(run, model, tokenizer, optimizer, generator, progress, args)
    finish(run, model, tokenizer, optimizer, generator, progress, args)
    return scores


def shared_arguments(parser, **defaults):
    """The flags that both trainers have; `defaults` holds those that differ."""
    g = parser.add_argument_group("task and model")
    g.add_argument("--task", default="gp-l", help=f"one of {', '.join(tasks.TASKS)}: GeneralPoints or V-IRL, in text or in pictures")
    g.add_argument("--rule", help="rule that is trained: values of J,Q,K [/target=N][/cards=N] (default: 10), for V-IRL absolute or "
                   "relative (default: absolute)")
    g.add_argument("--visual", help="look that is trained, for tasks in pictures (default: the task's)")
    g.add_argument("--train", nargs="+", choices=list(PARTS), help="parts that are trained (default: the decoder; without LoRA and "
                   "with pictures all)")
    g.add_argument("--model", default="tiny", help="tiny (the shipped base of the task), or a model directory")
    g.add_argument("--init", help="start from this run's weights instead of --model's")
    g.add_argument("--lora-rank", type=int, default=0, help="rank of LoRA on all linear layers of the trained parts; 0 = full")
    g.add_argument("--lora-alpha", type=float, default=32.0, help="LoRA scale is alpha / rank")
    g.add_argument("--attempts", type=int, default=1, help="answers an episode may have (a walk: at each position), with the "
                   "verifier's words between")
    g.add_argument("--max-new-tokens", type=int, default=None, help="tokens per answer (default: 64 tiny, 256 else)")
    g = parser.add_argument_group("length: one of the two; --flops is how two arms are given equal compute")
    g.add_argument("--steps", type=int, default=defaults["steps"], help="optimizer steps")
    g.add_argument("--flops", type=float, default=0.0, help="training FLOPs of this run, rollouts included (0: --steps)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--lr", type=float, default=defaults["lr"], help="peak learning rate of AdamW")
    g.add_argument("--optimizer", choices=("adamw", "adamw16", "muon"), default="adamw", help="adamw16: weights and state in bfloat16, "
                   "full fine-tuning in little memory; muon: for training from scratch")
    g.add_argument("--schedule", choices=("cosine", "constant"), default=defaults["schedule"], help="of the rate after the warm-up")
    g.add_argument("--lr-warmup", type=int, default=10, help="steps of linear learning-rate warm-up")
    g.add_argument("--lr-end", type=float, default=0.1, help="last learning rate as a share of the peak")
    g.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's, per step as a share of --lr")
    g.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    g.add_argument("--micro-batch", type=int, default=256, help="episodes per forward pass: memory, not the result (but "
                   "adamw16 adds gradients in bfloat16: 4 or more there)")
    g.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, one more forward pass")
    g = parser.add_argument_group("evaluation along the way")
    g.add_argument("--evals", type=int, default=2, help="evaluations spread over the run, start and end included; 1: the end")
    g.add_argument("--eval-n", type=int, default=200, help="held-out problems")
    g.add_argument("--eval-split", choices=("val", "test"), default="val", help="val chooses settings, test is for claims")
    g.add_argument("--eval-suite", default=None, help="suite to evaluate (default: the task's)")
    g.add_argument("--eval-rows", nargs="+", choices=list(ROWS), help="only these rows of it (default: all of them at the end)")
    g.add_argument("--rows", type=int, default=256, help="episodes computed side by side in rollouts")
    g = parser.add_argument_group("run")
    g.add_argument("--out", default=defaults["out"], help="run directory to create")
    g.add_argument("--resume", metavar="RUN", help="continue this run with its own arguments")
    g.add_argument("--seed", type=int, default=0, help="shifts the training problems, orders and samples")
    g.add_argument("--save-every", type=int, default=100, help="steps between checkpoints besides those at evaluations")
    g.add_argument("--device", default="auto", help="auto, cpu or cuda")
    g.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")


def finish_arguments(parser, argv):
    """Parse, take the arguments of a resumed run, and check what can be checked before anything is written."""
    args = parser.parse_args(argv)
    if args.resume:
        if args.init:
            raise ValueError("--init starts a run and --resume continues one: give only one of them.")
        unset = dict.fromkeys(vars(args), parser)  # a value that no flag has: what still has it was not given
        given = {k: v for k, v in vars(parser.parse_args(argv, argparse.Namespace(**unset))).items() if v is not parser}
        stored = stored_arguments(args, parser)
        if wrong := given.keys() - {"resume", "device", "threads"}:
            raise ValueError(f"--resume takes the arguments of the run it continues: leave out --{min(wrong).replace('_', '-')}.")
        vars(args).update(stored | given, out=args.resume)
    check_limits(args)
    args.rule = tasks.trained_rule(args.task) if args.rule is None else args.rule
    tasks.make(args.task, args.rule, args.visual, split="train", index=0, tile=1120)  # nothing is drawn
    if args.train and not tasks.pictures(args.task) and args.train != ["decoder"]:
        raise ValueError(f"--train: {args.task} shows no pictures, so only the decoder can be trained.")
    if args.eval_suite not in (None, *tasks.SUITES):
        raise ValueError(f"--eval-suite must be one of {', '.join(tasks.SUITES)}.")
    args.fresh = getattr(args, "fresh", False)
    if not args.resume:
        args.init_path = None if args.fresh else str(find_model(args.init or args.model, args.task))
    return args


def stored_arguments(args, parser):
    """The arguments in args.json of the run that --resume names."""
    path = Path(args.resume) / "args.json"
    if not path.is_file():
        raise ValueError(f"{args.resume} holds no run (no args.json); --resume needs a run directory.")
    stored, flags = read_json(path), vars(args).keys() - {"resume"} | {"init_path"}
    if not isinstance(stored, dict) or flags - stored.keys():
        raise ValueError(f"{path} was not written by {parser.prog}; continue the run with the script that began it.")
    for action in parser._actions:
        if action.dest in flags and not could_give(action, stored[action.dest]):
            raise ValueError(f"{path}: {action.dest} cannot be {clean(json.dumps(stored[action.dest]))[:60]}.")
    if not isinstance(stored["init_path"], (str, type(None))):
        raise ValueError(f"{path}: init_path cannot be {clean(json.dumps(stored['init_path']))[:60]}.")
    return stored


def could_give(action, value):
    """Whether a flag (an argparse action) could have given this value."""
    if value is None or isinstance(value, list) != (action.nargs == "+"):
        return value is None and action.default is None
    kinds = (int, float) if action.type is float else (action.type or (bool if action.nargs == 0 else str),)
    values = value if isinstance(value, list) else [value]
    return all(type(v) in kinds and (not action.choices or v in action.choices) for v in values)


def parse_args(argv=None):
    """Command line of supervised fine-tuning."""
    parser = Parser("Supervised fine-tuning on demonstrations.")
    shared_arguments(parser, steps=300, lr=3e-4, schedule="cosine", out="runs/sft")
    g = parser.add_argument_group("supervised fine-tuning")
    g.add_argument("--batch", type=int, default=256, help="demonstrations per step")
    g.add_argument("--rules", nargs="+", metavar="RULE:WEIGHT", default=None, help="mixture of rules; default: --rule")
    g.add_argument("--visuals", nargs="+", metavar="LOOK:WEIGHT", default=None, help="mixture of looks; default: --visual")
    g.add_argument("--demonstrators", nargs="+", metavar="KIND:WEIGHT", default=["expert"],
                   help=f"mixture of demonstrators: {', '.join(tasks.KINDS)}; V-IRL: {', '.join(tasks.WALKERS)}")
    g.add_argument("--split", choices=("train", "base"), default="train", help="base: as train, but with rules under which "
                   "face cards give a hand the numbers of a held-out one; it stands in for pretraining")
    g.add_argument("--fresh", action="store_true", help="random weights and a new tokenizer for --model tiny or small")
    g.add_argument("--fresh-eyes", action="store_true", help="random weights for the tower, the projector and the cross layers")
    args = finish_arguments(parser, argv)
    args.rules = args.rules or [args.rule]
    args.visuals = args.visuals or ([args.visual] if args.visual else None)
    draw(args, random.Random(0))
    if args.fresh and (args.lora_rank or args.init):
        raise ValueError("--fresh trains all of a new model: leave out --lora-rank and --init.")
    if args.fresh and args.model not in ("tiny", "small"):
        raise ValueError("--fresh makes a model from nothing: --model must be tiny or small.")
    return args


if __name__ == "__main__":
    run_main(main)
