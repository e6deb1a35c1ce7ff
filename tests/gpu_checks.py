"""What only a GPU can show of the decoding in model.py; on a CPU the same lines run, with nothing to compare.

    python tests/gpu_checks.py            about a minute on a GPU; speed and memory: tests/benchmark.py --size 11b --minutes 8, which
                                          begins with this

Each check says whether it holds, and the next one follows; status 1 when one does not.
1. A model read onto the GPU is the one read into memory.
2. Steps replayed as a CUDA graph write what steps one by one write: float32, greedy and sampled, ragged prompts in groups,
   three turns with rows that leave, pictures, LoRA; and again from the graph of the rollout before, with other weights. The
   steps one by one are those of a CPU: lengths are not rounded up and only slots in use are attended to.
3. Training's log-probs and gradients with lengths rounded up are those without.
4. bfloat16: log-probs of a group over its shared prompt against those of a pass over whole texts.
5. The peak of a second rollout's memory is that of the first: the graph's memory is used again.
"""
import sys
import traceback
from itertools import product
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import model as M  # noqa: E402

BASE = Path(__file__).resolve().parents[1] / "assets/tiny-gp-vl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def texts(model, count, seed, image):
    """Ragged prompts of token ids, with <|image|> in second place."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(6, 470, (n,), generator=generator).tolist() for n in (7, 19, 12, 30)[:count]]
    return [[row[0], model.config.text.vocab_size, *row[1:]] if image else row for row in rows]


def pictures(model, count):
    L = model.config.vision.image_size
    tiles = torch.randn(count, 1, 4, 3, L, L, generator=torch.Generator().manual_seed(6))
    return model.encode_images(tiles, torch.tensor([[1], [3], [6], [6]])[:count])


@torch.no_grad()
def play(model, prompts, group, temperature, image, turns=3, new=20):
    """[(text, response, log_probs)] of all turns, as a rollout plays them."""
    ids, lengths = M.pad_rows(prompts, 0, DEVICE)
    cache = M.Cache(model, len(ids), ids.shape[1], pictures(model, len(prompts)) if image else None)
    rows = torch.arange(len(ids), device=DEVICE).repeat_interleave(group)
    logits = model.extend(cache, ids, lengths)[rows]
    cache.select(rows)
    told, found = [prompts[row] for row in rows.tolist()], []
    generator = torch.Generator(DEVICE).manual_seed(3)
    for turn in range(turns):
        responses, log_probs = M.generate(model, cache, logits, M.Sampling(new, temperature, generator), {-1})
        found += list(zip(told, responses, log_probs))
        if turn + 1 == turns:
            break
        going = [i for i in range(len(told)) if (i + turn) % 4 != 1] or [0]
        told = [told[i] + responses[i] + [9] * (2 + i % 3) for i in going]
        cache.select(torch.tensor(going, device=DEVICE))
        ids, lengths = M.pad_rows([t[n:] for t, n in zip(told, cache.length.tolist())], 0, DEVICE)
        logits = model.extend(cache.reserve(ids.shape[1]), ids, lengths)
    return found


def step_by_step():
    """A context in which all is computed as on a CPU: no graph is made, no length rounded up."""
    return mock.patch.dict(M.MULTIPLE, clear=True)


def tiny():
    """(model in float32 with random adapters, function that changes them)"""
    torch.manual_seed(0)
    model, _ = M.load_model(BASE, device=DEVICE)
    M.add_lora(model, 4, 8.0)

    @torch.no_grad()
    def change():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    change()
    return model, change


def check_loading():
    here, there = M.load_model(BASE)[0].state_dict(), M.load_model(BASE, device=DEVICE)[0].state_dict()
    assert all(torch.equal(t, there[name].cpu()) for name, t in here.items())
    return f"{len(here)} tensors are the same"


CASES = [(*how, *size) for how in product((False, True), (0.0, 1.0)) for size in ((1, 1), (4, 1), (3, 5), (1, 16))]


def check_graph(cases=CASES):
    """cases: (image, temperature, prompts, answers to each)."""
    model, change = tiny()
    worst = 0.0
    for image, temperature, count, group in cases:
        for again in range(2):  # the second time from the graph of the first, with other weights
            change()
            prompts = texts(model, count, again, image)
            with step_by_step():
                want = play(model, prompts, group, temperature, image)
            got = play(model, prompts, group, temperature, image)
            assert [r for _, r, _ in got] == [r for _, r, _ in want], (image, temperature, count, group)
            worst = max(worst, *(abs(a - b) for x, y in zip(got, want) for a, b in zip(x[2], y[2])))
    assert worst < 1e-4, worst
    return f"graph and single steps: the same tokens, log-probs within {worst:.1e}"


def check_rounding():
    model, _ = tiny()
    found = []
    for context in (step_by_step(), mock.patch.dict(M.MULTIPLE)):
        with context:
            rows = [prompt + [11] * n for prompt in texts(model, 4, 0, False) for n in (5, 9, 2)]
            chosen = [[0] * len(prompt) + [1] * n for prompt in texts(model, 4, 0, False) for n in (5, 9, 2)]
            ids, chosen = M.pad_rows(rows, 0, DEVICE)[0], M.pad_rows(chosen, 0, DEVICE)[0].bool()
            model.zero_grad()
            log_probs = model.log_probs(ids, chosen)
            log_probs.mean().backward()
            found.append([log_probs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    worst = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
    assert worst < 1e-4, worst
    return f"lengths rounded up: log-probs and {len(found[0]) - 1} gradients within {worst:.1e}"


def half():
    """The model in bfloat16, its adapters in float32."""
    model, _ = tiny()
    model.to(torch.bfloat16)
    for linear in M.linear_layers(model).values():
        if linear.lora_A is not None:
            linear.lora_A.float(), linear.lora_B.float()
    return model


def check_bfloat16():
    model = half()
    prompts, off = texts(model, 4, 0, False), []
    for text, response, log_probs in play(model, prompts, 8, 1.0, False, turns=1):
        ids = torch.tensor([text + response], device=DEVICE)
        chosen = torch.arange(ids.shape[1], device=DEVICE)[None] >= len(text)
        off += (model.log_probs(ids, chosen).detach().cpu() - torch.tensor(log_probs)).abs().tolist()
    assert sum(off) / len(off) < 0.05, sum(off) / len(off)
    return f"bfloat16, rollout against training: mean {sum(off) / len(off):.4f}, largest {max(off):.4f}"


def check_memory():
    if DEVICE == "cpu":
        return "nothing to measure on a CPU"
    model, peaks = half(), []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        play(model, texts(model, 4, 0, False), 16, 1.0, False, turns=1, new=60)
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    assert peaks[2] < 1.1 * peaks[0], peaks
    return f"peaks of three rollouts, MiB: {[round(peak, 1) for peak in peaks]}"


def main():
    failed = False
    for number, check in enumerate((check_loading, check_graph, check_rounding, check_bfloat16, check_memory), 1):
        try:
            print(f"{number}. {check()}", flush=True)
        except Exception:
            failed = True
            print(f"{number}. {check.__name__} FAILED: {traceback.format_exc()[-1500:]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
