"""What training is charged, against torch's counter: text, pictures, LoRA, recompute, groups that share a prompt, KL, rollouts."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import evaluate as E
import model as M
import tasks
import train_rl as RL
import train_sft as SFT
from conftest import ROOT

aten = torch.ops.aten


class Counter(FlopCounterMode):
    """torch's counter, which knows neither the CPU's attention nor `addmm_`. Attention is counted by the convention of
    `pass_flops`: causal ones and masked ones as the pairs that are seen, backward twice forward. Other kernels that torch may
    choose (two batched products) are counted by torch, as whole squares."""

    def __init__(self, model):
        text, vision = model.config.text, model.config.vision
        image, tower = M.image_tokens(model.config), vision.hidden_size // vision.attention_heads

        def pairs(q, k, causal, mask):
            B, H, T, size = q.shape
            if size == tower:
                assert text.head_dim != tower
                return B * H * T * k.shape[2]
            if causal:
                return B * H * T * (T + 1) // 2
            if k.shape[2] % image == 0:  # cross attention: one image a token
                return B * H * T * image
            return int((mask if mask.dtype == torch.bool else mask > -1).expand(B, H, T, k.shape[2]).sum())

        def forward(q, k, v, dropout=0.0, causal=False, *, attn_mask=None, **_):
            return 4 * q.shape[-1] * pairs(q, k, causal, attn_mask)

        def backward(grad, q, k, v, out, sums, dropout, causal, *, attn_mask=None, **_):
            return 8 * q.shape[-1] * pairs(q, k, causal, attn_mask)

        forward._get_raw = backward._get_raw = True  # tensors, not their shapes
        super().__init__(display=False, custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
            aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]})


def counted(model, function, *args):
    """(FLOPs by the counter, what the function returns)."""
    with Counter(model) as counter:
        result = function(*args)
    return counter.get_total_flops(), result


ALL = ["decoder", "projector", "tower"]
CASES = [("gp-l", None, 0, False), ("gp-l", None, 8, False), ("gp-l", None, 0, True), ("gp-l", None, 8, True),
         ("gp-vl", None, 0, False), ("gp-vl", ["decoder"], 0, False), ("gp-vl", ["tower"], 0, False),
         ("gp-vl", ["projector"], 0, True), ("gp-vl", None, 8, False), ("gp-vl", ["tower", "projector"], 8, False),
         ("gp-vl", ALL, 8, True)]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    """(model, tokenizer, arguments, how problems are put to it) of a shipped base, with the parts that are trained."""
    task, train, rank, recompute = request.param
    path = ROOT / "assets" / f"tiny-{task}"
    args = SimpleNamespace(task=task, train=train, lora_rank=rank, lora_alpha=16.0, init_path=path)
    model, tokenizer = M.load_model(path)
    SFT.choose_parameters(model, args)
    model.recompute(recompute)
    return model, tokenizer, args, E.prompt_style(model, tokenizer)


def test_sft(case):
    model, tokenizer, args, style = case
    problems = [tasks.make(args.task, "10", index=i, attempts=2, **style) for i in range(40)]
    episodes = [E.Episode.demonstrated(problem, tokenizer, [problem.expert()]) for problem in problems]
    episodes = [e for e in episodes if len(e.ids) == len(episodes[0].ids)][:3]  # no padding
    flops, _ = counted(model, SFT.sft_backward, model, episodes, tokenizer.pad, 8)
    assert len(episodes) == 3 and SFT.sft_flops(model, episodes)[0] == pytest.approx(flops, rel=0.02)


def test_rl(case):
    """Rollout, update and reference by themselves. No answer stops, so all rows stay equally long."""
    model, tokenizer, args, style = case
    tokenizer.stop_ids = {10**6}
    sampling = M.Sampling(12, 1.0, torch.Generator().manual_seed(0))
    playing, groups = counted(model, E.rollout, model, tokenizer, [tasks.make(args.task, "10", index=0, **style)], 16, sampling)
    advantage, (plain, kl) = torch.ones(1, 16), [RL.LossSettings("dr_grpo", 1.0, 0.0, coef, 256) for coef in (0.0, 0.1)]
    silent, updated, compared = (RL.step_flops(model, groups, *pair, epochs=1)[0] for pair in (
        (0 * advantage, plain), (advantage, plain), (advantage, kl)))
    reference, comparing = SFT.make_reference(model, args), []

    def noted(*arguments):
        flops, log_probs = counted(model, reference, *arguments)
        comparing.append(flops)
        return log_probs
    updating, _ = counted(model, RL.rl_backward, model, groups, advantage, kl, tokenizer.pad, noted)
    assert silent == pytest.approx(playing, rel=0.02)
    assert updated - silent == pytest.approx(updating - sum(comparing), rel=0.02)
    assert compared - updated == pytest.approx(sum(comparing), rel=0.02)


@pytest.mark.parametrize("train", [None, ["decoder"]])
def test_walks_with_a_picture_at_every_position(train):
    """A walk at a time: two demonstrations in one batch would be padded."""
    model, tokenizer = M.load_model(ROOT / "assets/tiny-virl-vl")
    SFT.choose_parameters(model, SimpleNamespace(task="virl-vl", train=train, lora_rank=0))
    problem = tasks.make("virl-vl", "absolute", index=1, attempts=2, **E.prompt_style(model, tokenizer))
    episode = E.Episode.demonstrated(problem, tokenizer, problem.demonstrate("expert", None)[::2])
    flops, _ = counted(model, SFT.sft_backward, model, [episode], tokenizer.pad, 1)
    assert len(episode.pictures) > 2 and SFT.sft_flops(model, [episode])[0] == pytest.approx(flops, rel=0.02)
