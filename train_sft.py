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
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import tasks
from evaluate import (Episode, clean, device_and_dtype, evaluate, find_model, latest_checkpoint, micro_batches, run_main,
                      summary, to_batch)
from model import (SIZES, LlamaVision, add_lora, count_parameters, init_weights, load_model, save_adapter, save_model,
                   text_flops, train_tokenizer, training_flops, write_atomically, write_json)

# ---------------------------------------------------------------- 1. Run directory


class Run:
    """runs/NAME: everything that one run of a script leaves behind.

    args.json          its arguments                      metrics.jsonl   one JSON object a step
    evals/NNNNNN.json  an evaluation, hand by hand        samples/        episodes in plain text (RL)
    step-NNNNNN/       a checkpoint: a model directory as the hub has it (or an adapter as PEFT has it) and, in the two
                       newest, state.pt: optimizer, step, random states; tensors and plain values only
    latest             the name of the newest complete checkpoint, written last
    source/            a copy of the five files, since people edit them
    """

    def __init__(self, args):
        self.path, self.stopping = Path(args.out), False
        if not args.resume:
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty; choose another --out, or continue it with --resume.")
            (self.path / "source").mkdir(parents=True, exist_ok=True)
            for name in ("train_sft", "train_rl", "evaluate", "model", "tasks"):
                shutil.copy(Path(__file__).parent / f"{name}.py", self.path / "source")
            write_json(self.path / "args.json", vars(args))
        for folder in ("evals", "samples"):
            (self.path / folder).mkdir(exist_ok=True)

    def catch_signals(self):
        """Ctrl-C and SIGTERM finish the step and save; a second one exits at once."""
        def handler(number, frame):
            if self.stopping:
                os._exit(130)
            self.stopping = True
            print("stopping after this step; once more to exit at once", file=sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def log(self, record):
        """Append one record to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, model, tokenizer, state, base=None):
        """A checkpoint of step state["step"]: an adapter when `base` names what it belongs to, else all weights."""
        name = f"step-{state['step']:06d}"
        temporary = self.path / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if base:
            save_adapter(model, temporary, base)
        else:
            save_model(model, tokenizer, temporary)
        torch.save(state, temporary / "state.pt")
        shutil.rmtree(self.path / name, ignore_errors=True)
        os.replace(temporary, self.path / name)
        write_atomically(self.path / "latest", lambda p: p.write_text(name + "\n"))
        for old in sorted(self.path.glob("step-*/state.pt"))[:-2]:  # two to continue from; of the others the weights
            old.unlink()

    def load_state(self):
        """The state of the latest checkpoint; metrics that were written after it are dropped."""
        state = torch.load(latest_checkpoint(self.path) / "state.pt", weights_only=True)
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        write_atomically(self.path / "metrics.jsonl", lambda p: p.write_text("".join(kept)))
        return state


# ---------------------------------------------------------------- 2. Progress


class Progress:
    """How far a run is: by --steps, or by --flops when a budget is given (so that two arms spend the same)."""

    def __init__(self, args):
        self.args, self.step, self.flops, self.flops_paper, self.seconds = args, 0, 0, 0, 0.0
        self.evals_done, self.began = 0, time.time()

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
        """Whether the next of --evals evaluations (start and end included) is reached."""
        if not self.args.evals or self.evals_done > self.args.evals - 1:
            return False
        return self.done() or self.share() * (self.args.evals - 1) >= self.evals_done

    def add(self, flops, flops_paper, seconds):
        """Count one finished step."""
        self.step, self.flops, self.flops_paper = self.step + 1, self.flops + flops, self.flops_paper + flops_paper
        self.seconds += seconds

    def line(self, record):
        """What the terminal shows of a step."""
        left = self.seconds / max(self.share(), 1e-9) * (1 - min(1, self.share()))
        words = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        return f"step {self.step:4d} {100 * min(1, self.share()):3.0f}% left {left // 60:.0f}:{left % 60:02.0f} | {words}"

    def state(self):
        """Plain values for a checkpoint."""
        return {k: getattr(self, k) for k in ("step", "flops", "flops_paper", "seconds", "evals_done")}

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
    result = evaluate(model, tokenizer, args.eval_suite or args.task, args.eval_n, args.attempts,
                      args.eval_split, args.max_new_tokens, args.rows)
    result |= {"step": progress.step, "flops": progress.flops, "flops_paper": progress.flops_paper,
               "seconds": round(progress.seconds, 2)}
    write_json(run.path / "evals" / f"{progress.step:06d}.json", result)
    scores = summary(result)
    print(f"  eval at step {progress.step}, {args.eval_n} held-out hands: " + ", ".join(
        f"{row} {100 * scores[f'{row}/greedy/episode']:.1f} greedy {100 * scores[f'{row}/sampled/episode']:.1f} sampled"
        for row in result["rows"]), flush=True)
    progress.evals_done += 1
    return scores


def set_up(args):
    """Model, tokenizer, optimizer, sampling generator, progress and run of a training script, new or resumed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device, dtype = device_and_dtype(args.device)
    run, progress = Run(args), Progress(args)
    generator = torch.Generator(device).manual_seed(args.seed)
    start = latest_checkpoint(run.path) if args.resume else None
    if args.fresh and not start:
        model, tokenizer = fresh_model(args)
        model = model.to(device)
    else:
        model, tokenizer = load_model(start or args.init_path, dtype if args.lora_rank else torch.float32, device)
    if args.lora_rank and not any(".lora_" in name for name, _ in model.named_parameters()):
        add_lora(model, args.lora_rank, args.lora_alpha)
    model.recompute(args.recompute)
    optimizer = make_optimizer(model, args)
    if start:
        state = run.load_state()
        optimizer.load_state_dict(state["optimizer"])
        restore_random_states(state["random"], generator)
        progress.restore(state["progress"])
    sizes = count_parameters(model)
    print(f"{run.path}: {sizes['decoder']:,} decoder + {sizes['vision']:,} vision parameters, {sizes['trained']:,} "
          f"trained ({'LoRA rank %d' % args.lora_rank if args.lora_rank else 'full fine-tuning'}), {device}, "
          f"{torch.get_num_threads()} threads" + (f", continued at step {progress.step}" if start else ""), flush=True)
    run.catch_signals()
    return model, tokenizer, optimizer, generator, progress, run


def freeze_unused(model):
    """Text-only training leaves out the tower, the projector and the cross layers: they would get no gradient."""
    model.vision_model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(False)
    for i in model.config.text.cross_attention_layers:
        model.language_model.model.layers[i].requires_grad_(False)


def make_optimizer(model, args):
    """AdamW on what is trained: the adapters, or with rank 0 all of the text path.

    --optimizer muon orthogonalises the updates of the layers' matrices (Jordan et al., 2024, as in torch.optim.Muon) and
    leaves the rest to AdamW: about twice as fast where a model learns from nothing.
    """
    if not args.lora_rank:
        freeze_unused(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": args.weight_decay}
    if getattr(args, "optimizer", "adamw") == "adamw":
        return torch.optim.AdamW(trained.values(), **adamw)
    matrices = [name for name, p in trained.items() if ".layers." in name and p.dim() == 2]
    return Pair(torch.optim.Muon([trained[n] for n in matrices], lr=args.lr, weight_decay=args.weight_decay, momentum=0.95,
                                 adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW([p for n, p in trained.items() if n not in matrices], **adamw))


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


def update(model, optimizer, lr, max_grad_norm):
    """Clip the gradient, take one step. Returns the norm before clipping; a non-finite one stops the run."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_grad_norm).item()
    if not math.isfinite(norm):
        raise ValueError("the gradient is not finite; nothing was updated. Lower --lr, or continue with --resume.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
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


def check_rule(text):
    """ValueError for a rule text that cannot be read."""
    tasks.parse_rule(tasks.fill_rule(text, random.Random(0)))


def check_kind(name):
    """ValueError for an unknown demonstrator."""
    if name not in tasks.KINDS:
        raise ValueError(f"--demonstrators {clean(name)}: choose from {', '.join(tasks.KINDS)}.")


def draw(args, rng):
    """A rule and a demonstrator of the mixture."""
    (rule,), (kind,) = (rng.choices(*parse_weights(*part)) for part in (
        (args.rules, "rules", check_rule), (args.demonstrators, "demonstrators", check_kind)))
    return rule, kind


def demonstration(args, tokenizer, index):
    """The training episode number `index`: a pure function of the arguments, so a resumed run needs no data state."""
    rng = random.Random(f"demonstrator/{args.seed}/{index}")
    rule, kind = draw(args, rng)
    style = "short" if tokenizer.short else "full"
    problem = tasks.make(args.task, rule, split=args.split, index=index, style=style, seed=args.seed)
    return demonstrated_episode(tokenizer, problem, problem.demonstrate(kind, rng))


def demonstrated_episode(tokenizer, problem, texts):
    """Response, verifier's words, response, ... as an Episode whose mask marks the responses and their stop tokens."""
    episode = Episode(problem)
    episode.read(tokenizer.prompt(problem.prompt, image=problem.image is not None))
    for i, text in enumerate(texts):
        if i % 2 == 0:
            episode.respond(tokenizer.encode(text) + [tokenizer.eot])
        else:
            episode.read(tokenizer.turn(text))
    return episode


def fresh_model(args):
    """A tokenizer learned from the mixture's own texts, and random weights to go with it."""
    texts = []
    for index in range(2000):
        rng = random.Random(f"tokenizer/{index}")
        rule, kind = draw(args, rng)
        problem = tasks.make(args.task, rule, split=args.split, index=index, style="short")
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
        log_probs, _ = model.log_probs(ids, chosen)
        part_loss = -log_probs.sum() / tokens
        part_loss.backward()
        loss += part_loss.item()
    if not math.isfinite(loss):
        raise ValueError("the loss is not finite; nothing was updated. Lower --lr, or continue with --resume.")
    return loss, tokens


def batch_flops(model, episodes, args):
    """(FLOPs of one update on these episodes, the paper's 6 N D)."""
    forward = sum(text_flops(model.config, 0, len(e.ids) - 1, sum(e.response_mask)) for e in episodes)
    weights = text_flops(model.config, 0, 1, 1) // 2
    return (training_flops(forward, args.lora_rank > 0, args.recompute),
            6 * weights * sum(len(e.ids) for e in episodes))


# ---------------------------------------------------------------- 5. Training loop and command line


def main(argv=None):
    """Train; returns the scores of the last evaluation."""
    args = parse_args(argv)
    model, tokenizer, optimizer, generator, progress, run = set_up(args)
    scores = {}
    if progress.eval_due():
        scores = evaluate_run(run, model, tokenizer, progress, args)
    while not progress.done() and not run.stopping:
        began, lr, first = time.time(), progress.lr(), progress.step * args.batch
        episodes = [demonstration(args, tokenizer, first + i) for i in range(args.batch)]
        loss, tokens = sft_backward(model, episodes, tokenizer.pad, args.micro_batch)
        norm = update(model, optimizer, lr, args.max_grad_norm)
        progress.add(*batch_flops(model, episodes, args), time.time() - began)
        record = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens, "seconds": time.time() - began}
        print(progress.line(record), flush=True)
        due = progress.eval_due()
        if due:
            scores = evaluate_run(run, model, tokenizer, progress, args)
        run.log({"step": progress.step, "flops": progress.flops, **record, **(scores if due else {})})
        if due or run.stopping or progress.done() or (args.save_every and progress.step % args.save_every == 0):
            save_run(run, model, tokenizer, optimizer, generator, progress, args)
    print(f"{'stopped; continue with --resume' if run.stopping else 'done'}: {run.path}", flush=True)
    return scores


def shared_arguments(parser, **defaults):
    """The flags that both trainers have; `defaults` holds those that differ."""
    g = parser.add_argument_group("task and model")
    g.add_argument("--task", default="gp-l", help="gp-l: GeneralPoints in text")
    g.add_argument("--rule", default=tasks.ID_RULE, help="rule that is trained: values of J,Q,K [/target=N][/cards=N]")
    g.add_argument("--model", default="tiny", help="tiny (the shipped base of the task), or a model directory")
    g.add_argument("--init", help="start from this run's weights instead of --model's")
    g.add_argument("--lora-rank", type=int, default=0, help="rank of LoRA on all linear layers of the decoder; 0 = full")
    g.add_argument("--lora-alpha", type=float, default=32.0, help="LoRA scale is alpha / rank")
    g.add_argument("--attempts", type=int, default=1, help="answers an episode may have, with the verifier's words between")
    g.add_argument("--max-new-tokens", type=int, default=None, help="tokens per answer (default: 64 tiny, 256 else)")
    g = parser.add_argument_group("length: one of the two; --flops is how two arms are given equal compute")
    g.add_argument("--steps", type=int, default=defaults["steps"], help="optimizer steps")
    g.add_argument("--flops", type=float, default=0.0, help="training FLOPs of this run, rollouts included (0: --steps)")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--lr", type=float, default=defaults["lr"], help="peak learning rate of AdamW")
    g.add_argument("--schedule", choices=("cosine", "constant"), default=defaults["schedule"])
    g.add_argument("--lr-warmup", type=int, default=10, help="steps of linear learning-rate warm-up")
    g.add_argument("--lr-end", type=float, default=0.1, help="last learning rate as a share of the peak")
    g.add_argument("--weight-decay", type=float, default=0.0)
    g.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    g.add_argument("--micro-batch", type=int, default=256, help="episodes per forward pass; changes memory, not the result")
    g.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, one more forward pass")
    g = parser.add_argument_group("evaluation along the way")
    g.add_argument("--evals", type=int, default=2, help="evaluations spread over the run, start and end included")
    g.add_argument("--eval-n", type=int, default=200, help="held-out hands")
    g.add_argument("--eval-split", choices=("val", "test"), default="val", help="val chooses settings, test is for claims")
    g.add_argument("--eval-suite", default=None, help="suite to evaluate (default: the task's)")
    g.add_argument("--rows", type=int, default=256, help="episodes computed side by side in rollouts")
    g = parser.add_argument_group("run")
    g.add_argument("--out", default=defaults["out"], help="run directory to create")
    g.add_argument("--resume", metavar="RUN", help="continue this run with its own arguments")
    g.add_argument("--seed", type=int, default=0, help="shifts the training problems, orders and samples")
    g.add_argument("--save-every", type=int, default=100, help="steps between checkpoints besides those at evaluations")
    g.add_argument("--device", default="auto", help="auto, cpu or cuda")
    g.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")


def finish_arguments(parser, argv):
    """Parse, take the arguments of a resumed run, check what can be checked before anything is written."""
    args = parser.parse_args(argv)
    if args.resume:
        if args.init:
            raise ValueError("--init starts a run and --resume continues one: give only one of them.")
        if not (Path(args.resume) / "args.json").is_file():
            raise ValueError(f"{args.resume} holds no run (no args.json); --resume needs a run directory.")
        stored = json.loads((Path(args.resume) / "args.json").read_text())
        vars(args).update(stored, resume=args.resume, out=args.resume)
        return args
    tasks.make(args.task, args.rule, split="train", index=0)
    for name in ("steps", "batch", "problems", "group", "micro_batch", "attempts", "eval_n", "rows"):
        if hasattr(args, name) and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1.")
    if not 0 < args.lr < 10:
        raise ValueError("--lr must be a positive number, such as 1e-4.")
    if not getattr(args, "fresh", False):
        args.fresh, args.init_path = False, str(find_model(args.init or args.model, args.task))
    else:
        args.init_path = None
    args.max_new_tokens = args.max_new_tokens or (64 if "tiny" in args.model else 256)
    return args


def parse_args(argv=None):
    """Command line of supervised fine-tuning."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on demonstrations.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shared_arguments(parser, steps=300, lr=3e-4, schedule="cosine", out="runs/sft")
    g = parser.add_argument_group("supervised fine-tuning")
    g.add_argument("--batch", type=int, default=256, help="demonstrations per step")
    g.add_argument("--rules", nargs="+", metavar="RULE:WEIGHT", default=None, help="mixture of rules; default: --rule")
    g.add_argument("--demonstrators", nargs="+", metavar="KIND:WEIGHT", default=["expert"],
                   help=f"mixture of demonstrators: {', '.join(tasks.KINDS)}")
    g.add_argument("--split", choices=("train", "base"), default="train", help="base: as train, but with rules under which "
                   "face cards give a hand the numbers of a held-out one; it stands in for pretraining")
    g.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for training from scratch")
    g.add_argument("--fresh", action="store_true", help="random weights and a new tokenizer for --model tiny or small")
    args = finish_arguments(parser, argv)
    args.rules = args.rules or [args.rule]
    draw(args, random.Random(0))
    if args.fresh and args.model not in ("tiny", "small"):
        raise ValueError("--fresh makes a model from nothing: --model must be tiny or small.")
    return args


if __name__ == "__main__":
    run_main(main)
