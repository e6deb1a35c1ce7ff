"""Reinforcement learning with verifier rewards: REINFORCE, RLOO, GRPO, Dr. GRPO.

    python train_rl.py --task gp-l --init runs/warmup --out runs/rl

One step, and `main` reads like it:
    problems -> rollout (verifier in the loop) -> returns -> advantages -> one update

What became of PPO: no value network (a group's other episodes are the baseline), no minibatches,
clipping only where --epochs asks for more than one update. The four estimators differ in the few
lines of `advantages` and in the weight that `token_weights` gives to a token.

  1. Advantages (how much better than expected an episode did), 2. The loss, 3. One update
  (gradients over micro-batches), 4. The loop: up to here the reading path
  5. Problems, 6. measures of a step, 7. command line

Shapes: P problems, G episodes of each (a group); in a micro-batch B episodes of T tokens, of which
N were sampled; numbers (B, T) are 0 for the others.
"""
import math
import signal
from dataclasses import dataclass
from statistics import fmean

if __name__ == "__main__":  # Ctrl-C while torch is loaded ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch

import tasks
from evaluate import (Parser, by_prompt, images_for, micro_batches, number, prompt_style,
                      rollout, run_main, to_batch, truncated)
from model import Sampling, add_work, pass_flops
from train_sft import (finish_arguments, group_work, metrics_help, or_resume, shared_arguments,
                       share_of, start_run, summed, text_weights, update)

# ---- 1. Advantages -------------------------------------------------------------------------------

ESTIMATORS = ("reinforce", "rloo", "grpo", "dr_grpo")


def advantages(returns: torch.Tensor, estimator: str) -> torch.Tensor:
    """How much better each episode did than expected. returns (P, G) float32 -> (P, G).

    reinforce  return minus the mean of the batch (Williams 1992, with the usual baseline)
    rloo       return minus the mean of the *other* episodes of its group
               (Ahmadian et al., arXiv 2402.14740)
    grpo       return minus the group's mean, over the group's standard deviation
               (Shao et al., arXiv 2402.03300)
    dr_grpo    return minus the group's mean (Liu et al., arXiv 2503.20783): without the division a
               problem that is nearly always or nearly never solved counts no more than others
    A group of equal returns gives exactly 0; reinforce, whose baseline is the batch's, does not.
    """
    P, G = returns.shape
    if estimator == "reinforce":
        return returns - summed(returns.sum()) / summed(returns.numel())
    centred = returns - returns.mean(1, keepdim=True)
    equal = (returns == returns[:, :1]).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, centred)  # rounding is no signal
    if estimator == "rloo":
        return centred * (G / max(1, G - 1))  # r - mean of others = (r - mean of all) * G / (G - 1)
    if estimator == "grpo":
        return centred / (returns.std(1, keepdim=True, correction=0) + 1e-4)
    if estimator == "dr_grpo":
        return centred
    raise ValueError(f"--estimator must be one of {', '.join(ESTIMATORS)}.")


def without_truncated(advantage, groups, tokenizer):
    """The advantages (P, G), 0 where the last answer was cut off: that it was long does not make
    it wrong ("overlong filtering", DAPO, Yu et al., arXiv 2503.14476)."""
    whole = [[episode.ids[-1] in tokenizer.stop_ids for episode in group] for group in groups]
    return advantage * torch.tensor(whole)


# ---- 2. The loss ---------------------------------------------------------------------------------

def token_weights(chosen, estimator, episodes, tokens):
    """The weight of each token in the loss: (B, T), 0 where `chosen` (B, T) bool is False.

    grpo averages within an episode, then over the batch's `episodes`, so a token of a long answer
    counts less. The others divide by the batch's sampled `tokens`, as SFT and DAPO do: each token
    counts the same. Both numbers are those of the WHOLE batch, episodes without signal included,
    never of a micro-batch. Dr. GRPO divides by the longest answer that is allowed; we do not, since
    raising a limit that no answer reaches would then shrink the gradient.
    """
    if estimator == "grpo":
        return chosen.float() / (chosen.sum(1, keepdim=True) * episodes)
    return chosen.float() / tokens


def policy_loss(log_probs, old_log_probs, advantage, weight, clip_eps=0.0, clip_eps_high=0.0,
                level="token", cap=0.0):
    """-sum of weight * advantage * ratio, with ratio = p / p_old. advantage (B, 1), others (B, T).

    On policy the ratio is 1 and this is the policy gradient. clip_eps > 0 stops the pull on tokens
    whose ratio has already left [1 - eps, 1 + eps] in the direction of their advantage (PPO, arXiv
    1707.06347); the upper end may be another one (DAPO). At level "sequence" all tokens of an
    episode have the geometric mean of their ratios (GSPO, Zheng et al., arXiv 2507.18071).
    p_old is the rollout's, which in bfloat16 differs a little from training's: the ratios of a
    first update correct for that. cap > 0 truncates the correction (TIS, Yao et al. 2025,
    fengyao.notion.site/off-policy-rl). Returns (loss, number of tokens that were clipped).
    """
    log_ratio, chosen = log_probs - old_log_probs, weight > 0
    if level == "sequence":
        log_ratio = (log_ratio.sum(1) / chosen.sum(1))[:, None]
    ratio = log_ratio.exp()
    if cap:  # min(ratio, cap), with the gradient of log p kept
        ratio = ratio * (cap / ratio.detach()).clamp(max=1)
    gain = clipped = ratio * advantage
    if clip_eps:
        clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps_high or clip_eps)) * advantage
    return -(weight * torch.minimum(gain, clipped)).sum(), (chosen & (clipped < gain)).sum()


def kl_to_reference(log_probs, ref_log_probs):
    """The "k3" estimate of KL(policy || reference) per sampled token, (N,): r - 1 - log r with
    r = p_ref / p, never negative (Schulman, "Approximating KL Divergence", 2020).

    Only its value is k3: its own gradient would be that of KL(reference || policy). The gradient
    here is (log p - log p_ref) times that of log p. In expectation over the policy's samples both
    are exact for a token's KL, given the tokens before it. The gradient is not that of an answer's
    KL, which also changes with the prefixes. An older policy's samples (--epochs) bias both.
    """
    log_r = ref_log_probs - log_probs.detach()
    return (log_r.exp() - 1 - log_r) - log_r * (log_probs - log_probs.detach())


# ---- 3. One update -------------------------------------------------------------------------------

def with_signal(groups, advantage, kl_coef):
    """The episodes that add to the gradient: with an advantage, or all with a KL in the loss."""
    return [episode for episode, value in zip(sum(groups, []), advantage.flatten().tolist())
            if value or kl_coef]


def rl_backward(model, groups, advantage, loss, pad, reference=None):
    """Gradients of the loss on P groups of G episodes with advantages (P, G), in micro-batches.

    loss: LossSettings. reference: Run.reference, where the KL is measured. Episodes without
    signal are computed for that KL only, without gradient; they always count in the divisors.
    Returns metrics, {} when nothing is computed. FloatingPointError when the loss is not finite.
    """
    played = sum(groups, [])
    advantage_of = dict(zip(map(id, played), advantage.flatten().tolist()))
    tokens = summed(sum(episode.response_tokens for episode in played))
    count = summed(len(played))
    sums = dict.fromkeys(("loss", "kl", "clip_fraction", "ratio_error", "ratio_error_mean"), 0.0)
    kinds = [with_signal(groups, advantage, loss.kl_coef)]
    if reference is not None and not loss.kl_coef:
        kinds.append(with_signal(groups, advantage == 0, 0))
    parts = [part for kind in kinds
             for part in micro_batches(kind, loss.micro_batch, loss.micro_tokens)]
    computed = summed(sum(episode.response_tokens for part in parts for episode in part))
    for part in parts:
        ids, chosen, old_log_probs = to_batch(part, pad, model.device)
        values = [advantage_of[id(episode)] for episode in part]
        with torch.set_grad_enabled(bool(loss.kl_coef or any(values))):
            images = images_for(model, part)
            log_probs = model.log_probs(ids, chosen, loss.temperature, images)  # row after row
        weight = token_weights(chosen, loss.estimator, count, tokens)
        of_row = torch.tensor(values, device=model.device)[:, None]
        rows = torch.zeros_like(old_log_probs).masked_scatter(chosen, log_probs)
        part_loss, clipped = policy_loss(rows, old_log_probs, of_row, weight, loss.clip_eps,
                                         loss.clip_eps_high, loss.ratio, loss.ratio_cap)
        if reference is not None:
            kl = kl_to_reference(log_probs, reference(part, ids, chosen, images, loss.temperature))
            part_loss = part_loss + loss.kl_coef * (weight[chosen] * kl).sum()
            sums["kl"] += kl.detach().sum().item() / tokens
        if part_loss.requires_grad:
            part_loss.backward()
        sums["loss"] += part_loss.item()
        sums["clip_fraction"] += clipped.item() / tokens
        error = (rows - old_log_probs).abs()
        sums["ratio_error"] = max(sums["ratio_error"], error.max().item())
        sums["ratio_error_mean"] += error.sum().item() / computed
    if not math.isfinite(sums["loss"]):
        raise FloatingPointError("the loss is not finite")
    if reference is None:
        del sums["kl"]  # not measured is not 0
    return sums if computed else {}


# ---- 4. The loop ---------------------------------------------------------------------------------

def main(argv=None):
    """Train; returns the scores of the last evaluation."""
    args = parse_args(argv)
    run = start_run(args)
    run.shown = SHOWN
    model, tokenizer = run.model, run.tokenizer
    sampling = Sampling(args.max_new_tokens, args.temperature, run.generator, args.rollout_batch)
    loss = LossSettings(**{name: vars(args)[name] for name in LossSettings.__annotations__})
    stream = ProblemStream(args.task, args.rule, args.visual, args.attempts, args.seed,
                           args.problems, prompt_style(model, tokenizer))
    reference = run.reference if args.kl_coef or args.kl_every else None
    with run.failing_safely():
        while run.goes_on():
            problems = stream.problems(run.step)  # P
            groups = rollout(model, tokenizer, problems, args.group, sampling)  # P lists of G
            run.played(groups)
            returns = torch.tensor([[e.total(args.discount) for e in group] for group in groups])
            advantage = advantages(returns, args.estimator)  # (P, G), as the returns
            if args.mask_truncated:
                advantage = without_truncated(advantage, groups, tokenizer)
            measured = args.kl_coef or args.kl_every and run.step % args.kl_every == 0
            updates = []
            for _ in range(args.epochs):
                metrics = rl_backward(model, groups, advantage, loss, tokenizer.pad,
                                      reference if measured else None)
                updates.append(metrics | update(model, run.optimizer, run.lr(), args.max_grad_norm))
            metrics = rollout_metrics(groups, returns, tokenizer, updates)
            flops = step_flops(model, groups, advantage, loss, args.epochs)
            run.finish_step(metrics, flops, groups)
    return run.end()


# ==== The reading path ends here. Everything below can be skipped. ====

# ---- 5. Problems ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSettings:
    """The flags of these names: the parts of the loss, and how many episodes fit into memory."""

    estimator: str
    temperature: float
    clip_eps: float
    kl_coef: float
    micro_batch: int
    micro_tokens: int = 1 << 60
    clip_eps_high: float = 0.0
    ratio: str = "token"
    ratio_cap: float = 0.0


@dataclass(frozen=True)
class ProblemStream:
    """The training problems: those of a step are a pure function of these fields and the step."""

    task: str
    rule: str
    visual: str | None
    attempts: int
    seed: int
    count: int  # P
    style: dict  # of prompt_style: how problems are put to this model

    def problems(self, step):
        """The P problems of a step, or of several processes this one's share."""
        return [tasks.make(self.task, self.rule, self.visual, "train", i, self.attempts,
                           seed=self.seed, **self.style) for i in share_of(step, self.count)]


# ---- 6. Measures of a step -----------------------------------------------------------------------

METRICS = {  # named as in TRL where they are the same; --help prints them
    "reward": "mean return",
    "success": "share solved by any answer",
    "read": "share of what there is to see that the first answer names rightly",
    "signal": "share of groups with unequal returns",
    "entropy": "sum of -log p of the sampled tokens over their number, in nats",
    "kl": "of the policy to the start's, in nats a token of any episode",
    "grad_norm": "norm of the gradient before clipping",
    "step_time": "seconds of the step",
    "success_1": "share solved by the first answer",
    "mean_length": "sampled tokens of an episode",
    "loss": "policy loss",
    "learning_rate": "of the step",
    "repeat": "share of second and later answers that were given before",
    "truncated": "share of answers that were cut off",
    "tokens": "sampled tokens",
    "rollout_seconds": "time of the rollout",
    "update_seconds": "time of the update",
    "rollout_speed": "those a second of the rollout",
    "update_speed": "those a second of the update",
    "peak_gb": "most memory that a GPU held in the step, in 10^9 bytes",
    "clip_fraction": "share of the sampled tokens that were clipped",
    "ratio_error": "largest |log p of training - log p of the rollout|",
    "ratio_error_mean": "its mean over the tokens of the update",
}
SHOWN = list(METRICS)[:8]  # on the terminal


def rollout_metrics(groups, returns, tokenizer, updates=({},)) -> dict:
    """What the verifier and the texts say about a batch of groups, under their usual names, and the
    means of the metrics of its updates.

    entropy is a ratio of two sums. In large batches it tends to the entropy of an answer over its
    mean length, which is not the mean over answers of their entropy a token; in small ones it is
    biased, since long answers count in both sums.
    """
    episodes = sum(groups, [])
    tokens = sum(episode.response_tokens for episode in episodes)
    repeats = [repeated for episode in episodes for repeated in repeated_answers(episode.turns)]
    return {
        "reward": returns.mean().item(),
        "success_1": fmean(episode.solved(1) for episode in episodes),
        "success": fmean(episode.solved() for episode in episodes),
        "signal": (returns != returns[:, :1]).any(1).float().mean().item(),
        "read": fmean(episode.turns[0]["read"] for episode in episodes),
        "repeat": sum(repeats) / max(1, len(repeats)),
        "truncated": truncated(episodes, tokenizer),
        "entropy": -sum(sum(episode.log_probs) for episode in episodes) / tokens,
        "mean_length": tokens / len(episodes),
        "tokens": summed(tokens),
    } | {name: fmean(metrics[name] for metrics in updates) for name in updates[0]}


def repeated_answers(turns: list[dict]) -> list[bool]:
    """For every second and later answer to one question: whether it was given before. A walk asks
    anew at every position."""
    given, repeats = {}, []
    for turn in turns:
        before = given.setdefault(turn.get("position"), [])
        repeats += [turn["response"] in before] if before else []
        before.append(turn["response"])
    return repeats


def step_flops(model, groups, advantage, loss, epochs):
    """(FLOPs, the paper's formula) of a step.

    Every prompt and picture counts once per group, every sampled token once; then the update on the
    episodes with signal, prompts and pictures once per group here too (a group that is split over
    micro-batches computes its own more often; of the last layer's queries on a prompt the backward
    pass, which is skipped, is counted: 1 % at tiny size). A KL in the loss adds a pass of the
    reference; one that is only measured is free, as evaluations are. The paper's formula is 6 N D
    for the update and 2 N (6 D) for rollouts without a cache, D all tokens of the episodes, with
    signal or not.
    """
    trained = with_signal(groups, advantage, loss.kl_coef)
    played = add_work([group_work(group, cached=True) for group in groups])
    learned = add_work([group_work(group, encoded=model.trains_vision)
                        for group in by_prompt(trained)])
    update = pass_flops(model, learned, backward=True)
    if loss.kl_coef:
        update += pass_flops(model, learned, adapters=False)
    tokens = sum(len(episode.ids) for episode in sum(groups, []))
    flops = pass_flops(model, played) + epochs * update
    return flops, (6 * epochs + 12) * text_weights(model) * tokens


# ---- 7. Command line -----------------------------------------------------------------------------


# The study's PPO with a group in place of its value network; 512 episodes of 5 attempts at most are
# about its 2,048 answers a step.
PAPER = ("--problems 64 --group 8 --epochs 4 --clip-eps 0.1 --discount 0.9 --temperature 0.2 "
         "--lr-warmup 0 --optimizer adamw16 ")
PRESETS = {
    "paper": PAPER + "--attempts 5 --steps 20 --lr 1e-6",
    "paper-walks": PAPER + "--attempts 2 --steps 15 --lr 1e-6",
    "paper-walks-pictures": PAPER + "--attempts 2 --steps 15 --lr 1e-7",
    "ours": "--lora-rank 16 --problems 16 --group 16 --steps 100 --lr 2e-5 --evals 3",
}


def parse_args(argv=None):
    """Command line of reinforcement learning."""
    parser = Parser("Reinforcement learning with verifier rewards.")
    parser.epilog = metrics_help(METRICS)
    shared_arguments(parser, steps=300, lr=3e-5, schedule="constant", out="runs/rl",
                     presets=PRESETS)
    g = parser.add_argument_group("reinforcement learning")
    g.add_argument("--estimator", choices=ESTIMATORS, default="dr_grpo",
                   help="how returns become advantages")
    number(g, "--problems", 32, 1, 1e5, "problems per step")
    number(g, "--group", 8, 1, 1e4, "episodes per problem")
    number(g, "--temperature", 1.0, 0.05, 5, "of sampling, and of the log-probs in the loss")
    number(g, "--discount", 1.0, 0, 1, "per turn, in the return of an episode")
    number(g, "--clip-eps", 0.0, 0, 10, "PPO clipping of the ratio; 0: none")
    number(g, "--clip-eps-high", 0.0, 0, 10, "its upper end, where that is another; 0: the same "
           "(DAPO: 0.28 beside 0.2)")
    g.add_argument("--ratio", choices=("token", "sequence"), default="token", help="sequence: one "
                   "ratio for all tokens of an episode, their geometric mean (GSPO, with "
                   "--estimator grpo --clip-eps 3e-4 --clip-eps-high 4e-4)")
    number(g, "--ratio-cap", 0.0, 0, 1e6, "a token's gradient counts at most so many times, "
           "however large its ratio (truncated importance sampling, with 2); 0: no cap")
    g.add_argument("--mask-truncated", action="store_true", help="learn nothing from the return of "
                   "an episode whose last answer was cut off at --max-new-tokens (DAPO)")
    number(g, "--epochs", 1, 1, 100, "updates per batch of rollouts (the log has their mean); "
           "--clip-eps and --ratio do nothing to the first")
    number(g, "--kl-coef", 0.0, 0, 1e3, "weight of KL(policy || start's policy) in the loss; "
           "without LoRA the start is loaded as a second model")
    number(g, "--kl-every", 0, 0, 1e8, "measure that KL every so many steps; 0: never. Without "
           "LoRA the start is loaded as a second model")
    args = finish_arguments(parser, argv, PRESETS)
    if args.epochs == 1 and (args.clip_eps or args.ratio == "sequence"):
        raise ValueError("--clip-eps and --ratio sequence do nothing to the only update of a "
                         "batch: give --epochs 2 or more, or leave them out.")
    if args.clip_eps_high and not args.clip_eps:
        raise ValueError("--clip-eps-high is the upper end of --clip-eps: give that too.")
    if args.group < 2 and args.estimator != "reinforce":
        raise ValueError("--group must be at least 2: one episode has no group to be compared "
                         "with.")
    return or_resume(parser, args)


if __name__ == "__main__":
    run_main(main)
