"""Reinforcement learning with verifier rewards: REINFORCE, RLOO, GRPO, Dr. GRPO.

    python train_rl.py --task gp-l --init runs/warmup --out runs/rl

One step, and `main` reads like it:
    problems -> rollout (batched, KV cache, verifier in the loop) -> returns -> advantages -> one update -> log line, sample

What is left out on purpose: a value network, minibatches within a batch, length penalties, asynchronous rollouts.
The four estimators differ in the few lines of `advantages` and in the weight that `token_weights` gives to a token.

Shapes: P problems, G episodes of each (a group), B = P * G.
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import replace

import torch

import tasks
from evaluate import (Parser, by_prompt, micro_batches, rollout, run_main, seen_by, show_episode, shown_to, to_batch,
                      truncated)
from model import adapters_off, image_flops, load_model, text_flops, training_flops
from train_sft import (evaluate_run, finish, finish_arguments, save_run, set_up, shared_arguments, training_image_flops, update,
                       warn_truncated)

ESTIMATORS = ("reinforce", "rloo", "grpo", "dr_grpo")

# ---------------------------------------------------------------- 1. The lesson: advantages and the loss


def advantages(returns, estimator):
    """How much better each episode did than expected. returns (P, G) float32 -> (P, G).

    reinforce  return minus the mean of the batch (Williams 1992, with the usual baseline)
    rloo       return minus the mean of the *other* episodes of its group (Ahmadian et al., arXiv 2402.14740)
    grpo       return minus the group's mean, over the group's standard deviation (Shao et al., arXiv 2402.03300)
    dr_grpo    return minus the group's mean (Liu et al., arXiv 2503.20783): no division, so that problems that are
               nearly always or nearly never solved do not count more than the others
    A group of equal returns gives exactly 0 (but for reinforce, whose baseline is not the group's).
    """
    P, G = returns.shape
    if estimator == "reinforce":
        return returns - returns.mean()
    centred = returns - returns.mean(1, keepdim=True)
    centred = torch.where((returns == returns[:, :1]).all(1, keepdim=True), 0.0, centred)  # rounding is no signal
    if estimator == "rloo":
        return centred * (G / max(1, G - 1))  # r - mean of the others = (r - mean of all) * G / (G - 1)
    if estimator == "grpo":
        return centred / (returns.std(1, keepdim=True, correction=0) + 1e-4)
    if estimator == "dr_grpo":
        return centred
    raise ValueError(f"--estimator must be one of {', '.join(ESTIMATORS)}.")


def token_weights(chosen, estimator, episodes, max_tokens):
    """What each sampled token counts in the loss, for chosen (B, T) bool of some of the batch's `episodes`.

    grpo averages within an episode, then over episodes, so tokens of long answers count less; the others divide by a
    constant, which leaves the policy gradient unbiased. The divisor belongs to the whole batch, never to a micro-batch.
    """
    if estimator == "grpo":
        return chosen.float() / (chosen.sum(1, keepdim=True).clamp(min=1) * episodes)
    return chosen.float() / (max_tokens * episodes)


def policy_loss(log_probs, old_log_probs, advantage, weight, clip_eps=0.0):
    """-sum of weight * advantage * ratio, with ratio = p / p_old. All arguments (N,), one entry per sampled token.

    On policy the ratio is 1 and this is the policy gradient. clip_eps > 0 stops the pull on tokens whose ratio has
    already left [1 - eps, 1 + eps] in the direction of their advantage (PPO, arXiv 1707.06347).
    Returns (loss, share of tokens that were clipped).
    """
    ratio = (log_probs - old_log_probs).exp()
    gain = ratio * advantage
    if not clip_eps:
        return -(weight * gain).sum(), torch.zeros(())
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage
    return -(weight * torch.minimum(gain, clipped)).sum(), (clipped < gain).float().mean()


def kl_to_reference(log_probs, ref_log_probs):
    """The "k3" estimate of KL(policy || reference) per sampled token: r - 1 - log r with r = p_ref / p, never negative
    (Schulman, "Approximating KL Divergence", 2020).

    Only its value is k3: its own gradient would be that of KL(reference || policy). The gradient here is (log p - log p_ref)
    times that of log p, which is KL(policy || reference)'s in expectation over tokens that the policy sampled.
    """
    log_r = ref_log_probs - log_probs.detach()
    return (log_r.exp() - 1 - log_r) - log_r * (log_probs - log_probs.detach())


# ---------------------------------------------------------------- 2. One update


def rl_backward(model, episodes, advantage, args, pad, reference=None):
    """Gradients of the loss on `episodes` with one advantage each, in micro-batches. Returns a dict of metrics.

    Episodes that add nothing (advantage 0 and no KL) are left out by the caller, and still count in the divisor.
    """
    advantage_of = {id(e): a for e, a in zip(episodes, advantage)}
    tokens, count = sum(sum(e.response_mask) for e in episodes), args.problems * args.group
    sums = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "ratio_error": 0.0}
    for part in micro_batches(episodes, args.micro_batch):
        ids, chosen, old = to_batch(part, pad, model.device)
        image = seen_by(model, part)
        log_probs = model.log_probs(ids, chosen, args.temperature, image)
        per_row = torch.tensor([advantage_of[id(e)] for e in part], device=ids.device)
        weight = token_weights(chosen, args.estimator, count, args.attempts * args.max_new_tokens)[chosen]
        loss, clipped = policy_loss(log_probs, old[chosen], per_row[:, None].expand(chosen.shape)[chosen], weight, args.clip_eps)
        if reference is not None:
            kl = kl_to_reference(log_probs, reference(part, ids, chosen, image))
            loss = loss + args.kl_coef * (weight * kl).sum()
            sums["kl"] += kl.detach().sum().item() / tokens
        loss.backward()
        share = log_probs.numel() / tokens
        sums["loss"] += loss.item()
        sums["clip_fraction"] += clipped.item() * share
        sums["ratio_error"] = max(sums["ratio_error"], (log_probs - old[chosen]).abs().max().item())
    if not math.isfinite(sums["loss"]):
        raise FloatingPointError("the loss is not finite")
    return sums


def make_reference(model, args):
    """A function (episodes, ids, chosen, image) -> log-probs of the start's policy: the adapter off, or the start's weights. Where
    tower or projector are trained the start looks at the pictures with its own eyes."""
    start = model if args.lora_rank else load_model(args.init_path, model.language_model.lm_head.weight.dtype, model.device)[0]

    def reference(episodes, ids, chosen, image=None):
        with torch.no_grad(), adapters_off(start) if args.lora_rank else nullcontext():
            image = seen_by(start, [replace(e, seen=[]) for e in episodes]) if model.learns_to_see else image
            return start.log_probs(ids, chosen, args.temperature, image)
    return reference


# ---------------------------------------------------------------- 3. What a step is measured by


def step_flops(model, groups, trained, args):
    """(FLOPs, the paper's formula) of a step: every prompt and picture once per group, every sampled token once, then the update
    on the episodes with signal, prompts and pictures once per group here too (a group split over micro-batches computes its own
    more often); of several pictures a token counts the one that it sees. The paper's formula is 6 N D for what is trained and
    2 N (6 D) for rollouts without a cache, D all tokens of the episodes, with signal or not."""
    config, rollout_cost, forward, seeing = model.config, 0, 0, 0
    for group in groups:
        prompt, image = group[0].response_mask.index(1), bool(group[0].pictures)
        rollout_cost += text_flops(config, 0, prompt, 1, image) + max(len(e.pictures) for e in group) * sum(image_flops(config))
        rollout_cost += sum(text_flops(config, prompt, len(e.ids) - 1, sum(e.response_mask) - 1, image) for e in group)
    for group in by_prompt(trained):
        start, image = group[0].response_mask.index(1) - 1, bool(group[0].pictures)
        forward += text_flops(config, 0, start, 0, image)  # each episode's own part begins with the prompt's last token
        forward += sum(text_flops(config, start, len(e.ids) - 1, sum(e.response_mask), image) for e in group)
        seeing += max(len(e.pictures) for e in group) * training_image_flops(model, args, encoded=True)
    references = forward * args.epochs if args.kl_coef else 0
    weights, read = text_flops(config, 0, 1, 1) // 2, sum(len(e.ids) for group in groups for e in group)
    updates = args.epochs * (training_flops(forward, args.lora_rank > 0, args.recompute) + seeing)
    return rollout_cost + references + updates, (6 * args.epochs + 2 * 6) * weights * read


def rollout_metrics(groups, returns, tokenizer):
    """What the verifier and the texts say about a batch of groups, under their usual names."""
    episodes = [e for group in groups for e in group]
    turns, tokens = [e.turns for e in episodes], sum(sum(e.response_mask) for e in episodes)
    # second and later answers to the same question; on a walk every position asks anew
    asked = [[u["response"] for u in ts[:i] if u.get("position") == t.get("position")] for ts in turns for i, t in enumerate(ts)]
    later = [t["response"] in before for t, before in zip((t for ts in turns for t in ts), asked) if before]
    return {
        "reward": returns.mean().item(),
        "success_1": sum(e.solved(1) for e in episodes) / len(episodes),
        "success": sum(e.solved() for e in episodes) / len(episodes),
        "signal": (returns != returns[:, :1]).any(1).float().mean().item(),  # share of groups with unequal returns
        "read": sum(t["read"] for ts in turns for t in ts[:1]) / len(episodes),  # what the first answer names rightly of what is seen
        "repeat": sum(later) / max(1, len(later)),  # share of second and later answers that were given before
        "truncated": truncated(episodes, tokenizer),
        "entropy": -sum(sum(e.log_probs) for e in episodes) / tokens,  # its unbiased estimate from what was sampled
        "tokens": tokens,
    }


# ---------------------------------------------------------------- 4. Training loop and command line


def main(argv=None):
    """Train; returns the scores of the last evaluation."""
    args = parse_args(argv)
    model, tokenizer, optimizer, generator, progress, run = set_up(args)
    reference = make_reference(model, args) if args.kl_coef or args.kl_every else None
    scores = {}
    if progress.eval_due():
        scores = evaluate_run(run, model, tokenizer, progress, args)
    while not (progress.done() or progress.stuck or run.stopping):
        began, lr = time.time(), progress.lr()
        problems = training_problems(args, model, tokenizer, progress.step)
        groups = rollout(model, tokenizer, problems, args.group, args.max_new_tokens, args.temperature, generator, args.rows)
        rollout_seconds = time.time() - began

        returns = torch.tensor([[e.total(args.discount) for e in group] for group in groups])  # (P, G)
        advantage = advantages(returns, args.estimator)
        trained = [(e, a) for group, row in zip(groups, advantage.tolist()) for e, a in zip(group, row) if a or args.kl_coef]
        record = rollout_metrics(groups, returns, tokenizer)
        if trained:
            measured = args.kl_coef or (args.kl_every and progress.step % args.kl_every == 0)
            with run.keeping(progress.step + 1, [e for e, _ in trained]):
                for _ in range(args.epochs):
                    record |= rl_backward(model, *zip(*trained), args, tokenizer.pad, reference if measured else None)
                    record["grad_norm"] = update(model, optimizer, lr, args.max_grad_norm, progress)
            if not measured:
                del record["kl"]

        for e in (e for group in groups for e in group):
            e.seen = []  # before others are encoded

        seconds = time.time() - began
        progress.add(*step_flops(model, groups, [e for e, _ in trained], args), seconds)
        progress.wasted("signal", not trained, f"no group had unequal returns (success {100 * record['success']:.0f} %), so nothing "
                        "could be learned: raise --group or --temperature, or give a better (or a less perfect) --init.")
        record |= {"lr": lr, "rollout_seconds": rollout_seconds, "update_seconds": seconds - rollout_seconds}
        print(progress.line({k: record[k] for k in SHOWN if k in record}), flush=True)
        due = progress.eval_due()
        if due:
            scores = evaluate_run(run, model, tokenizer, progress, args)
            write_samples(run, progress.step, groups)
        run.log({"step": progress.step, "flops": progress.flops, **record, **(scores if due else {})})
        if due or (args.save_every and progress.step % args.save_every == 0):
            save_run(run, model, tokenizer, optimizer, generator, progress, args)
        warn_truncated(run, progress, "sampled", record["truncated"], args)
    finish(run, model, tokenizer, optimizer, generator, progress, args)
    return scores


SHOWN = ("reward", "success_1", "success", "read", "signal", "entropy", "kl", "grad_norm", "rollout_seconds", "update_seconds")


def training_problems(args, model, tokenizer, step):
    """The P problems of a step: a pure function of the arguments and the step."""
    return [tasks.make(args.task, args.rule, args.visual, "train", step * args.problems + i, args.attempts, seed=args.seed,
                       **shown_to(model, tokenizer)) for i in range(args.problems)]


def write_samples(run, step, groups, count=4):
    """The first episode of a few groups as readable JSON."""
    shown = [show_episode("train", group[0]) for group in groups[:count]]
    (run.path / "samples" / f"{step:06d}.json").write_text(json.dumps(shown, indent=1))


def parse_args(argv=None):
    """Command line of reinforcement learning."""
    parser = Parser("Reinforcement learning with verifier rewards.")
    shared_arguments(parser, steps=300, lr=1e-4, schedule="constant", out="runs/rl")
    g = parser.add_argument_group("reinforcement learning")
    g.add_argument("--estimator", choices=ESTIMATORS, default="dr_grpo", help="how returns become advantages")
    g.add_argument("--problems", type=int, default=32, help="problems per step")
    g.add_argument("--group", type=int, default=8, help="episodes per problem")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling, and of the log-probs that are trained")
    g.add_argument("--discount", type=float, default=1.0, help="per turn, in the return of an episode")
    g.add_argument("--clip-eps", type=float, default=0.0, help="PPO clipping of the ratio; 0 = none")
    g.add_argument("--epochs", type=int, default=1, help="updates per batch of rollouts; --clip-eps does nothing to the first")
    g.add_argument("--kl-coef", type=float, default=0.0, help="weight of KL(policy || start's policy) in the loss")
    g.add_argument("--kl-every", type=int, default=10, help="measure that KL every so many steps (0 = never)")
    args = finish_arguments(parser, argv)
    if args.clip_eps and args.epochs == 1:
        raise ValueError("--clip-eps does nothing to the only update of a batch: give --epochs 2 or more, or leave it out.")
    if args.group < 2 and args.estimator != "reinforce":
        raise ValueError("--group must be at least 2: one episode has no group to be compared with.")
    return args


if __name__ == "__main__":
    run_main(main)
