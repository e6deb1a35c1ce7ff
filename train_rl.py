"""Reinforcement learning with verifier rewards: REINFORCE, RLOO, GRPO, Dr. GRPO.

    python train_rl.py --task gp-l --init runs/warmup --out runs/rl

One step, and `main` reads like it:
    problems -> rollout (batched, KV cache, verifier in the loop) -> returns -> advantages -> one update

What became of PPO here: no value network (the other episodes of a group are the baseline), no minibatches within a
batch, clipping only where --epochs asks for more than one update, no length penalty, no asynchronous rollouts.
The four estimators differ in the few lines of `advantages` and in the weight that `token_weights` gives to a token.

Contents
  1. Advantages     how much better than expected an episode did
  2. The loss       of sampled tokens: policy gradient, clipping, KL
  3. One update     gradients over micro-batches
  4. The loop       main
  (the reading path ends)
  5. Measures       of a step: what the verifier and the texts say, FLOPs
  6. Command line

Shapes: P problems, G episodes of each (a group), B = P * G episodes, T tokens, N sampled tokens of a micro-batch.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

import tasks
from evaluate import (Episode, Parser, between, by_prompt, images_for, micro_batches, prompt_style, rollout, run_main,
                      to_batch, truncated)
from model import LlamaVision, Sampling, adapters_off, image_flops, load_model, text_flops
from train_sft import (finish_arguments, metrics_help, shared_arguments, start_run, update, update_flops,
                       update_image_flops)

# ---- 1. Advantages -------------------------------------------------------------------------------

ESTIMATORS = ("reinforce", "rloo", "grpo", "dr_grpo")


def advantages(returns: torch.Tensor, estimator: str) -> torch.Tensor:
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
    equal = (returns == returns[:, :1]).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, centred)  # rounding is no signal
    if estimator == "rloo":
        return centred * (G / max(1, G - 1))  # r - mean of the others = (r - mean of all) * G / (G - 1)
    if estimator == "grpo":
        return centred / (returns.std(1, keepdim=True, correction=0) + 1e-4)
    if estimator == "dr_grpo":
        return centred
    raise ValueError(f"--estimator must be one of {', '.join(ESTIMATORS)}.")


# ---- 2. The loss ---------------------------------------------------------------------------------


def token_weights(chosen: torch.Tensor, estimator: str, episodes: int, tokens: int) -> torch.Tensor:
    """The weight of each token in the loss: (B, T), 0 where `chosen` (B, T) bool is False.

    grpo averages within an episode, then over the batch's `episodes`, so a token of a long answer counts less. The others
    divide by the batch's sampled `tokens`, as SFT does: each token counts the same.
    Both numbers are those of the WHOLE batch, episodes without signal included, never of a micro-batch. And neither is
    --max-new-tokens: a divisor of that size would scale the gradient with a limit that no answer reached.
    """
    if estimator == "grpo":
        return chosen.float() / (chosen.sum(1, keepdim=True).clamp(min=1) * episodes)
    return chosen.float() / tokens


def policy_loss(log_probs, old_log_probs, advantage, weight, clip_eps: float = 0.0):
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
    """The "k3" estimate of KL(policy || reference) per sampled token, (N,): r - 1 - log r with r = p_ref / p, never
    negative (Schulman, "Approximating KL Divergence", 2020).

    Only its value is k3: its own gradient would be that of KL(reference || policy). The gradient here is
    (log p - log p_ref) times that of log p, which is KL(policy || reference)'s in expectation over tokens that the
    policy sampled.
    """
    log_r = ref_log_probs - log_probs.detach()
    return (log_r.exp() - 1 - log_r) - log_r * (log_probs - log_probs.detach())


# ---- 3. One update -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSettings:
    """The flags of these names: what the loss is made of, and how much of it fits into memory at a time."""

    estimator: str
    temperature: float
    clip_eps: float
    kl_coef: float
    micro_batch: int


def with_signal(groups, advantage, kl_coef: float) -> list[tuple[Episode, float]]:
    """(episode, its advantage), but for episodes that add nothing to the gradient: advantage 0 and no KL."""
    pairs = [pair for group, row in zip(groups, advantage.tolist()) for pair in zip(group, row)]
    return [(episode, a) for episode, a in pairs if a or kl_coef]


def rl_backward(model: LlamaVision, groups, advantage, loss: LossSettings, pad: int, reference=None) -> dict:
    """Gradients of the loss on P groups of G episodes with advantages (P, G), in micro-batches.

    Returns metrics, {} when no episode has signal. Episodes without signal are not computed, and still count in the
    divisor. FloatingPointError when the loss is not finite.
    """
    advantage_of = {id(episode): a for episode, a in with_signal(groups, advantage, loss.kl_coef)}
    played = [episode for group in groups for episode in group]
    trained = [episode for episode in played if id(episode) in advantage_of]
    if not trained:
        return {}
    tokens = sum(episode.response_tokens for episode in trained)
    all_tokens = sum(episode.response_tokens for episode in played)
    sums = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "ratio_error": 0.0}
    for part in micro_batches(trained, loss.micro_batch):
        batch = to_batch(part, pad, model.device)
        chosen, images = batch.chosen, images_for(model, part)
        log_probs = model.log_probs(batch.ids, chosen, loss.temperature, images)  # (N,)
        old_log_probs = batch.old_log_probs[chosen]
        weight = token_weights(chosen, loss.estimator, len(played), all_tokens)[chosen]
        of_row = torch.tensor([advantage_of[id(episode)] for episode in part], device=model.device)
        of_token = of_row[:, None].expand(chosen.shape)[chosen]
        part_loss, clipped = policy_loss(log_probs, old_log_probs, of_token, weight, loss.clip_eps)
        if reference is not None:
            kl = kl_to_reference(log_probs, reference(part, batch.ids, chosen, images))
            part_loss = part_loss + loss.kl_coef * (weight * kl).sum()
            sums["kl"] += kl.detach().sum().item() / tokens
        part_loss.backward()
        sums["loss"] += part_loss.item()
        sums["clip_fraction"] += clipped.item() * len(log_probs) / tokens
        sums["ratio_error"] = max(sums["ratio_error"], (log_probs - old_log_probs).abs().max().item())
    if not math.isfinite(sums["loss"]):
        raise FloatingPointError("the loss is not finite")
    if reference is None:
        del sums["kl"]  # not measured is not 0
    return sums


# ---- 4. The loop ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict:
    """Train; returns the scores of the last evaluation."""
    args = parse_args(argv)
    run = start_run(args)
    run.shown = SHOWN
    model, tokenizer = run.model, run.tokenizer
    sampling = Sampling(args.max_new_tokens, args.temperature, run.generator, args.rollout_batch)
    loss = LossSettings(args.estimator, args.temperature, args.clip_eps, args.kl_coef, args.micro_batch)
    reference = make_reference(model, args)
    try:
        while run.goes_on():
            problems = training_problems(args, prompt_style(model, tokenizer), run.step)             # P
            groups = rollout(model, tokenizer, problems, args.group, sampling)                       # P lists of G episodes
            run.lap("rollout_seconds")
            returns = torch.tensor([[e.total(args.discount) for e in group] for group in groups])    # (P, G)
            advantage = advantages(returns, args.estimator)                                          # (P, G)
            measured = args.kl_coef or args.kl_every and run.step % args.kl_every == 0
            for _ in range(args.epochs):
                metrics = rl_backward(model, groups, advantage, loss, tokenizer.pad, reference if measured else None)
                metrics |= update(model, run.optimizer, run.lr(), args.max_grad_norm)
            metrics = rollout_metrics(groups, returns, tokenizer) | metrics
            run.finish_step(metrics, step_flops(model, groups, advantage, loss, args.epochs), groups)
    except FloatingPointError as error:
        raise run.not_finite(error, [episode for group in groups for episode in group]) from None
    return run.end()


def training_problems(args, style: dict, step: int) -> list[tasks.Problem]:
    """The P problems of a step: a pure function of the arguments and the step."""
    first = step * args.problems
    return [tasks.make(args.task, args.rule, args.visual, "train", first + i, args.attempts, seed=args.seed, **style)
            for i in range(args.problems)]


def make_reference(model: LlamaVision, args):
    """A function (episodes, ids, chosen, images) -> log-probs (N,) of the start's policy; None where no flag asks for it.

    With LoRA it is this model with its adapters off, else a second model with the start's weights. Where tower or
    projector are trained the start looks at the pictures with its own eyes.
    """
    if not args.kl_coef and not args.kl_every:
        return None
    dtype = model.language_model.lm_head.weight.dtype
    start = model if args.lora_rank else load_model(args.init_path, dtype, model.device)[0]

    def reference(episodes, ids, chosen, images=None):
        with torch.no_grad(), adapters_off(start) if args.lora_rank else nullcontext():
            if model.trains_vision:
                images = images_for(start, [replace(episode, encoded=[]) for episode in episodes])
            return start.log_probs(ids, chosen, args.temperature, images)

    return reference


# ==== The reading path ends here. Everything below can be skipped. ====

# ---- 5. Measures of a step -----------------------------------------------------------------------

METRICS = {  # --help prints them
    "reward": "mean return", "success_1": "share solved by the first answer", "success": "share solved by any answer",
    "read": "share of what there is to see that the first answer names rightly", "signal": "share of groups with unequal returns",
    "entropy": "estimated from the sampled tokens, in nats", "kl": "of the policy to the start's, in nats a token",
    "grad_norm": "norm of the gradient before clipping", "rollout_seconds": "time of the rollout",
    "update_seconds": "time of the update", "seconds": "time of the step", "loss": "policy loss", "lr": "learning rate",
    "repeat": "share of second and later answers that were given before", "truncated": "share of answers that were cut off",
    "tokens": "sampled tokens", "clip_fraction": "share of tokens that were clipped",
    "ratio_error": "largest |log p of training - log p of the rollout|",
}
SHOWN = list(METRICS)[:10]  # on the terminal


def rollout_metrics(groups, returns, tokenizer) -> dict:
    """What the verifier and the texts say about a batch of groups, under their usual names."""
    episodes = [episode for group in groups for episode in group]
    tokens = sum(episode.response_tokens for episode in episodes)
    repeats = [repeated for episode in episodes for repeated in repeated_answers(episode.turns)]
    return {
        "reward": returns.mean().item(),
        "success_1": sum(episode.solved(1) for episode in episodes) / len(episodes),
        "success": sum(episode.solved() for episode in episodes) / len(episodes),
        "signal": (returns != returns[:, :1]).any(1).float().mean().item(),
        "read": sum(episode.turns[0]["read"] for episode in episodes) / len(episodes),
        "repeat": sum(repeats) / max(1, len(repeats)),
        "truncated": truncated(episodes, tokenizer),
        "entropy": -sum(sum(episode.log_probs) for episode in episodes) / tokens,  # unbiased: log_probs of samples
        "tokens": tokens,
    }


def repeated_answers(turns: list[dict]) -> list[bool]:
    """For every second and later answer to one question: whether it was given before. A walk asks anew at every position."""
    given, repeats = {}, []
    for turn in turns:
        before = given.setdefault(turn.get("position"), [])
        repeats += [turn["response"] in before] if before else []
        before.append(turn["response"])
    return repeats


def step_flops(model: LlamaVision, groups, advantage, loss: LossSettings, epochs: int) -> tuple[float, float]:
    """(FLOPs, the paper's formula) of a step.

    Every prompt and picture counts once per group, every sampled token once; then the update on the episodes with signal,
    prompts and pictures once per group here too (a group that is split over micro-batches computes its own more often). Of
    several pictures a token counts the one that it sees. The paper's formula is 6 N D for what is trained and 2 N (6 D)
    for rollouts without a cache, D all tokens of the episodes, with signal or not.
    """
    config, trained = model.config, [episode for episode, _ in with_signal(groups, advantage, loss.kl_coef)]
    playing = sum(group_flops(config, group, cached=True) for group in groups)
    playing += sum(most_pictures(group) * sum(image_flops(config)) for group in groups)
    forward = sum(group_flops(config, group, cached=False) for group in by_prompt(trained))
    pictures = sum(most_pictures(group) for group in by_prompt(trained))
    seeing = pictures * update_image_flops(model, encoded=True)
    references = forward * epochs if loss.kl_coef else 0
    weights, tokens = text_flops(config, 0, 1, 1) // 2, sum(len(e.ids) for group in groups for e in group)
    return playing + references + epochs * (update_flops(model, forward) + seeing), (6 * epochs + 12) * weights * tokens


def most_pictures(group: list[Episode]) -> int:
    """The pictures of a group: what one episode has seen continues what the others have."""
    return max(len(episode.pictures) for episode in group)


def group_flops(config, group: list[Episode], cached: bool) -> float:
    """Forward FLOPs of the decoder on a group whose prompt is computed once. cached: sampled token by token, where the
    prompt's last token gives the first logits of the whole group; else it begins each episode's own part."""
    prompt, image = group[0].response_mask.index(1) - (not cached), bool(group[0].pictures)
    own = sum(text_flops(config, prompt, len(e.ids) - 1, e.response_tokens - cached, image) for e in group)
    return text_flops(config, 0, prompt, int(cached), image) + own


# ---- 6. Command line -----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """Command line of reinforcement learning."""
    parser = Parser("Reinforcement learning with verifier rewards.")
    parser.epilog = metrics_help(METRICS)
    shared_arguments(parser, steps=300, lr=3e-5, schedule="constant", out="runs/rl")
    g = parser.add_argument_group("reinforcement learning")
    g.add_argument("--estimator", choices=ESTIMATORS, default="dr_grpo", help="how returns become advantages")
    g.add_argument("--problems", type=between(int, 1, 1e5), default=32, help="problems per step")
    g.add_argument("--group", type=between(int, 1, 1e4), default=8, help="episodes per problem")
    g.add_argument("--temperature", type=between(float, 0.05, 5), default=1.0, help="of sampling, and of the log-probs that are trained")
    g.add_argument("--discount", type=between(float, 0, 1), default=1.0, help="per turn, in the return of an episode")
    g.add_argument("--clip-eps", type=between(float, 0, 10), default=0.0, help="PPO clipping of the ratio; 0: none")
    g.add_argument("--epochs", type=between(int, 1, 100), default=1, help="updates per batch of rollouts; --clip-eps does "
                   "nothing to the first")
    g.add_argument("--kl-coef", type=between(float, 0, 1e3), default=0.0, help="weight of KL(policy || start's policy) in the "
                   "loss; without LoRA it loads the start as a second model")
    g.add_argument("--kl-every", type=between(int, 0, 1e8), default=0, help="measure that KL every so many steps; 0: never. "
                   "Without LoRA it loads the start as a second model")
    args = finish_arguments(parser, argv)
    if args.clip_eps and args.epochs == 1:
        raise ValueError("--clip-eps does nothing to the only update of a batch: give --epochs 2 or more, or leave it out.")
    if args.group < 2 and args.estimator != "reinforce":
        raise ValueError("--group must be at least 2: one episode has no group to be compared with.")
    return args


if __name__ == "__main__":
    run_main(main)
