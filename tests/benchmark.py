"""How fast, how much memory: ours beside transformers (+ peft) on the same weights, the same work, in the same run.

    python tests/benchmark.py                                    tiny, CPU, under three minutes
    python tests/benchmark.py --size 11b --out tests/results/11b.md    random weights in bf16, made on the GPU
    python tests/benchmark.py --size 11b --minutes 8 --out ...   one GPU for a quarter of an hour: tests/gpu_checks.py, then the rows
                                                        that matter most, in their order, while time lasts; written row by row,
                                                        so that a run that is cut off is of use, and what fails is said in its row
    python tests/benchmark.py --views                            street views only: pictures per second of one core

Where transformers or peft are not installed their columns stay empty. What makes the comparison fair:
- The same number of tokens: stop tokens are off, all rows have the same lengths, sampling is at temperature 1 without cuts.
- transformers runs at its fastest: of eager and sdpa attention with a dynamic or a static cache, the quickest in a trial
  of each row. Only the answer's logits are asked of it where it can be told so (logits_to_keep).
- Ours and theirs take turns within a row, and the table has medians: noise of a shared machine hits both.
- A GRPO step is everything from problems to updated adapters: rollout, decoding, verifier, loss, backward, AdamW. Rewards
  are set to a fixed pattern so that every group has signal. The last row takes them as they come: ours then skips the
  groups whose advantages are all zero, which changes nothing of the update.
"limit" is the least time that the hardware allows: the bytes that must be read over the measured bandwidth or the FLOPs
over the measured rate of a large matrix product, whichever is more. Peak memory is what a call adds to what was there before.
"""

import argparse
import copy
import ctypes
import datetime
import gc
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import model as M  # noqa: E402
import tasks  # noqa: E402
from assets import panoramas  # noqa: E402
from evaluate import Episode, rollout  # noqa: E402
from make_fixtures import hf_name  # noqa: E402
from train_rl import LossSettings, advantages, policy_loss, rl_backward, token_weights  # noqa: E402
from train_sft import sft_backward, update  # noqa: E402

try:
    import peft
    import transformers
except ImportError as error:
    peft = transformers = None
    print(f"{error}: ours alone is measured (pip install transformers peft for both)")

RANK, RATIO_2X2 = 8, 6  # LoRA rank; the aspect ratio of four tiles
# text: (rows, group) of the generation rows without and with an image; lengths in tokens
SIZES = {
    "tiny": dict(text=[(1, 1), (8, 1), (64, 1), (256, 1), (16, 16)], image=[(1, 1), (8, 1), (64, 1), (16, 16)],
                 prompt=19, new=25, train=128, problems=16, group=16, micro=256, encode=8, seconds=2.5),
    "11b": dict(text=[(1, 1), (8, 1), (64, 1), (256, 1), (16, 16)], image=[(1, 1), (8, 1), (32, 1), (16, 16)],
                prompt=250, new=60, train=16, problems=4, group=16, micro=16, encode=4, seconds=8.0),
}


# ---------------------------------------------------------------- the two sides


class Ours:
    """model.py, evaluate.rollout and the trainers' own update."""

    def __init__(self, model, tokenizer, s):
        self.model, self.tokenizer, self.s = model, copy.copy(tokenizer), s
        self.tokenizer.stop_ids = {-1}  # no stop tokens

    def images(self, tiles):
        """An ImageContext for one image of four tiles per row."""
        return self.model.encode_images(tiles[:, None], torch.full((len(tiles), 1), RATIO_2X2))

    @torch.no_grad()
    def generate(self, ids, tiles, group, new):
        image = None if tiles is None else self.images(tiles)
        cache = M.Cache(self.model, len(ids), ids.shape[1] + new * (group == 1), image)  # as a rollout does
        logits = self.model.extend(cache, ids, torch.full_like(ids[:, 0], ids.shape[1]))
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(group)
        if group > 1:
            cache.select(rows)
        out, _ = M.generate(self.model, cache, logits[rows], M.Sampling(new), {-1})
        assert len(out) == len(ids) * group and all(len(r) == new for r in out)

    @torch.no_grad()
    def encode(self, tiles):
        self.images(tiles)

    def add_lora(self):
        M.add_lora(self.model, RANK, 16)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)

    def update(self):
        update(self.model, self.optimizer, 1e-5, 1.0)

    def ragged(self, problems, group, new, seed):
        """(seconds of the rollout, of the update) of a GRPO step whose prompts and answers differ in length, also from step to step."""
        rng, tokenizer, problems = random.Random(seed), copy.copy(self.tokenizer), [copy.copy(problem) for problem in problems]
        tokenizer.stop_ids = set(range(0, self.model.config.text.vocab_size, 2 * new // 3))  # random weights meet one now and then
        for problem in problems:
            problem.prompt = " ".join([problem.prompt] + ["make 24"] * rng.randint(self.s["prompt"] // 4, self.s["prompt"] // 3))
        loss = LossSettings("grpo", temperature=1.0, clip_eps=0.0, kl_coef=0.0, micro_batch=self.s["micro"])
        found = []
        took = [seconds(lambda: found.extend(rollout(self.model, tokenizer, problems, group, M.Sampling(new))))]
        advantage = advantages(torch.tensor([[float(i % 2) for i in range(group)] for _ in problems]), "grpo")
        return [*took, seconds(lambda: (rl_backward(self.model, found, advantage, loss, tokenizer.pad), self.update()))]

    def train(self, ids, prompt):
        episodes = [Episode(SimpleNamespace(image=None), row, [0] * prompt + [1] * (len(row) - prompt), [0.0] * len(row)) for row in ids.tolist()]
        sft_backward(self.model, episodes, self.tokenizer.pad, self.s["micro"])
        self.update()

    def grpo(self, problems, group, new, pattern):
        loss = LossSettings("grpo", temperature=1.0, clip_eps=0.0, kl_coef=0.0, micro_batch=self.s["micro"])
        groups = rollout(self.model, self.tokenizer, problems, group, M.Sampling(new))
        rewards = [[e.total() for e in g] for g in groups] if pattern is None else pattern
        advantage = advantages(torch.tensor(rewards), "grpo")
        rl_backward(self.model, groups, advantage, loss, self.tokenizer.pad)
        self.update()


class Theirs:
    """transformers' MllamaForConditionalGeneration on the same tensors, and peft's LoRA on the same linear layers."""

    def __init__(self, model, tokenizer, s):
        data = json.loads(json.dumps(M.config_to_json(model.config)))
        data["vision_config"]["supported_aspect_ratios"] = [list(r) for r in M.RATIOS]
        data["text_config"] |= {"pad_token_id": tokenizer.pad, "bos_token_id": tokenizer.bos, "max_position_embeddings": 2048}
        with torch.device(model.device):
            self.hf = transformers.MllamaForConditionalGeneration._from_config(
                transformers.MllamaConfig(**data), dtype=model.language_model.lm_head.weight.dtype)
        self.hf.load_state_dict({hf_name(k): v for k, v in model.state_dict().items()}, strict=True, assign=True)
        self.model, self.tokenizer, self.s = self.hf.eval(), tokenizer, s
        self.settings = [(a, c) for a in ("sdpa", "eager") for c in (None, "static")]  # the fastest is taken

    def use(self, attention, cache):
        self.hf.set_attn_implementation(attention)
        self.attention, self.cache = attention, cache

    def images(self, tiles, length):
        """Arguments for one image of four tiles per row, seen from the second token on. The mask is always passed:
        without it cross attention under sdpa turns causal."""
        n, device = len(tiles), tiles.device
        mask = torch.ones(n, length, 1, 4, dtype=torch.long, device=device)
        mask[:, 0] = 0
        return dict(pixel_values=tiles[:, None], aspect_ratio_ids=torch.full((n, 1), RATIO_2X2, device=device),
                    aspect_ratio_mask=torch.ones(n, 1, 4, dtype=torch.long, device=device), cross_attention_mask=mask)

    @torch.no_grad()
    def generate(self, ids, tiles, group, new):
        more = {} if tiles is None else self.images(tiles, ids.shape[1])
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
            num_return_sequences=group, max_new_tokens=new, min_new_tokens=new, cache_implementation=self.cache, **more)
        assert out.shape == (len(ids) * group, ids.shape[1] + new)
        return out

    @torch.no_grad()
    def encode(self, tiles):
        given = self.images(tiles, 1)
        given.pop("cross_attention_mask")
        self.hf.model.multi_modal_projector(self.hf.model.vision_model(**given).last_hidden_state)

    def add_lora(self):
        config = peft.LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0,
                                 target_modules=r".*language_model\.layers.*\.(q|k|v|o|gate|up|down)_proj")
        self.model = peft.get_peft_model(self.hf, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)

    def update(self):
        torch.nn.utils.clip_grad_norm_([p for p in self.trained if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, ids, prompt):
        labels = ids.clone()
        labels[:, :prompt] = -100
        for part, target in zip(ids.split(self.s["micro"]), labels.split(self.s["micro"])):
            loss = self.model(input_ids=part, attention_mask=torch.ones_like(part), labels=target).loss
            (loss * len(part) / len(ids)).backward()
        self.update()

    def grpo(self, problems, group, new, pattern):
        prompts = [self.tokenizer.prompt(p.prompt) for p in problems]
        ids, lengths = M.pad_rows(prompts, self.tokenizer.pad, self.hf.device)
        assert int(lengths.min()) == ids.shape[1]  # equal lengths: no padding, no mask needed
        out = self.generate(ids, None, group, new)
        answers = out[:, ids.shape[1] :]
        texts = [self.tokenizer.decode(row) for row in answers.tolist()]
        rewards = torch.tensor([[copy.copy(p).step(t).reward for t in texts[i * group : (i + 1) * group]] for i, p in enumerate(problems)])
        advantage = advantages(torch.tensor(pattern) if pattern is not None else rewards, "grpo").flatten()[:, None].to(ids.device)
        weight = token_weights(torch.ones_like(answers), "grpo", len(out), answers.numel())
        for rows in torch.arange(len(out), device=ids.device).split(self.s["micro"]):
            logits = self.model(input_ids=out[rows], attention_mask=torch.ones_like(out[rows]), logits_to_keep=new + 1).logits[:, :-1]
            log_p = logits.float().log_softmax(-1).gather(2, answers[rows][..., None])[..., 0]
            policy_loss(log_p, log_p.detach(), advantage[rows], weight[rows])[0].backward()
        self.update()


# ---------------------------------------------------------------- measuring


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call):
    """Wall time of one call."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def peak_bytes(call):
    """Bytes that a call needed at its worst beyond what was held before it; None where the system does not tell."""
    M.GRAPHS.clear()  # what the graph of a step keeps counts too
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hand back what earlier calls freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except (OSError, AttributeError):  # not Linux with glibc
        call()
        return None


def compare(sides, call, budget, least=3):
    """{side: (median seconds, peak bytes, setting)}: the sides take turns until `budget` seconds are spent, at least `least`
    times. A side that runs out of memory gets no figures."""
    result = {}
    for side in list(sides):
        try:
            setting, trials = "", {}
            for setting in getattr(side, "settings", ()):
                side.use(*setting)
                call(side)
                trials[setting] = min(seconds(lambda: call(side)) for _ in range(2))
            if trials:
                side.use(*min(trials, key=trials.get))
                setting = f"{side.attention} {side.cache or 'dynamic'}"
            call(side)
            result[side] = [[], peak_bytes(lambda: call(side)), setting]
        except Exception as error:  # theirs, with a setting that fails here; or no memory: the other side goes on
            print(f"{type(side).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
            gc.collect(), torch.cuda.empty_cache()
    began = time.perf_counter()
    while result and (time.perf_counter() - began < budget or len(next(iter(result.values()))[0]) < least):
        for side, record in result.items():
            record[0].append(seconds(lambda: call(side)))
    return {side: (statistics.median(times), peak, setting) for side, (times, peak, setting) in result.items()}


# ---------------------------------------------------------------- the hardware's limit


def measured_limits(device, dtype):
    """(bytes/s of reading, FLOP/s of a large matrix product), the best of a few tries."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    big = torch.ones(2**30 if device == "cuda" else 2**26, device=device, dtype=torch.float32)
    rate = 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(6))
    return big.numel() * 4 / min(seconds(big.sum) for _ in range(6)), rate


class Limit:
    """Least seconds for a piece of work, from its bytes and FLOPs."""

    def __init__(self, model, bandwidth, rate):
        self.config, self.bandwidth, self.rate = model.config, bandwidth, rate
        self.size = model.language_model.lm_head.weight.element_size()
        self.tower = sum(p.numel() for n, p in model.vision_model.named_parameters() if "tile" not in n and "position" not in n)
        self.text = lambda *work: M.pass_flops(model, M.text_work(*work), adapters=False)

    def encode(self, images):
        """The tower and its attention over four padded tiles of each image, and the projector."""
        v = self.config.vision
        slots = 4 * (v.tokens + -v.tokens % 8)
        weights = self.tower + v.output_dim * self.config.text.hidden_size
        return images * (2 * weights * slots + 4 * v.hidden_size * slots**2 * (v.num_hidden_layers + v.num_global_layers)) / self.rate

    def cross(self, image):
        """(weights that a token meets in the cross layers, bytes of one image's keys and values)."""
        c = self.config.text
        q, kv, n = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, len(c.cross_attention_layers)
        return image * n * c.hidden_size * (2 * q + 3 * c.intermediate_size), image * n * 2 * kv * 4 * self.config.vision.tokens * self.size

    def generate(self, prompts, group, prompt, new, image):
        """Prompts once, then new - 1 steps that read the weights, every row's keys and values, and every image's."""
        c = self.config.text
        weights, image_bytes = self.cross(image)
        per_token = 2 * c.num_key_value_heads * c.head_dim * (c.num_hidden_layers - len(c.cross_attention_layers)) * self.size
        read = (self.text(0, 1, 1) / 2 + weights) * self.size + prompts * image_bytes
        read += prompts * group * per_token * (prompt + new / 2)
        work = prompts * group * (self.text(prompt, prompt + new - 1, new - 1) / (new - 1) + 2 * weights)
        first = prompts * (self.text(0, prompt, 1) + 2 * weights * prompt) / self.rate
        return self.encode(prompts * image) + first + (new - 1) * max(read / self.bandwidth, work / self.rate)

    def train(self, rows, length, scored):
        """One LoRA step: forward, and backward without gradients of the frozen weights. The adapters' own cost is left out."""
        return rows * 2 * self.text(0, length - 1, scored) / self.rate


# ---------------------------------------------------------------- the table


def benchmark(args):
    """All rows: (name, unit, count of units, {side: figures}, least seconds)."""
    s, device = SIZES[args.size], "cuda" if torch.cuda.is_available() and args.size != "tiny" else "cpu"
    torch.manual_seed(0)
    model, tokenizer = M.load_model(Path(__file__).resolve().parents[1] / "assets/tiny-gp-l")
    if args.size != "tiny":
        model = random_model(M.SIZES[args.size], device)
    dtype, c = model.language_model.lm_head.weight.dtype, model.config
    bandwidth, rate = measured_limits(device, dtype)
    limit = Limit(model, bandwidth, rate)
    ours = Ours(model, tokenizer, s)
    sides = [ours] + ([Theirs(model, tokenizer, s)] if peft else [])
    P, N = s["prompt"], s["new"]
    yield f"measured: {bandwidth / 1e9:.1f} GB/s read, {rate / 1e12:.3f} TFLOP/s {str(dtype).removeprefix('torch.')} matrix product"

    def row(name, unit, count, call, least):
        figures = compare(sides, call, s["seconds"])
        return name, unit, count, [figures.get(side) for side in sides], least

    def texts(n, length, image=False):
        ids = torch.randint(6, 470, (n, length), device=device)
        ids[:, 1] = torch.where(torch.tensor(image, device=device), c.text.vocab_size, ids[:, 1])
        return ids

    pictures = lambda n: torch.randn(n, 4, 3, c.vision.image_size, c.vision.image_size, device=device)
    for image, cases in ((False, s["text"]), (True, s["image"])):
        for n, group in cases:
            ids, tiles = texts(n, P, image), pictures(n) if image else None
            name = f"generate, batch {n * group}" + (f" ({n} prompts x {group})" if group > 1 else "") + (", image" if image else "")
            yield row(name, "tokens/s", n * group * N, lambda side: side.generate(ids, tiles, group, N), limit.generate(n, group, P, N, image))
    ids, tiles, n = texts(64, P), pictures(s["encode"]), s["encode"]
    yield row("prefill and one token, batch 64", "prompt tokens/s", 64 * P, lambda side: side.generate(ids, None, 1, 1),
              64 * limit.text(0, P, 1) / rate)
    yield row(f"vision encode, {n} images of 4 tiles", "images/s", n, lambda side: side.encode(tiles), limit.encode(n))

    for side in sides:
        side.add_lora()
        side.model.train()
        side.settings = [setting for setting in getattr(side, "settings", ()) if not setting[1]]  # the cache: dynamic
    assert len({sum(p.numel() for p in side.trained) for side in sides}) == 1
    ids = texts(s["train"], P + N)
    yield row(f"LoRA training step, {s['train']} x {P + N} tokens", "tokens/s", ids.numel(), lambda side: side.train(ids, P),
              limit.train(s["train"], P + N, N))
    problems = [tasks.make("gp-l", tasks.ID_RULE, split="train", index=i, style="short") for i in range(s["problems"])]
    G, B = s["group"], s["problems"] * s["group"]
    pattern = [[float(i % 2) for i in range(G)] for _ in problems]
    P = len(tokenizer.prompt(problems[0].prompt))
    least = limit.generate(len(problems), G, P, N, False) + limit.train(B, P + N, N)
    yield row(f"GRPO step, {len(problems)} problems x {G}", "episodes/s", B, lambda side: side.grpo(problems, G, N, pattern), least)
    yield row("GRPO step, rewards as they come", "episodes/s", B, lambda side: side.grpo(problems, G, N, None), least)
    if args.size == "11b":
        yield check_saving(model, tokenizer, device)


# tokens/s (images/s, episodes/s) of commit 04e1318 on an H200 by tests/results/11b-h200.md
BEFORE = {"generate, 1": 31, "generate, 16 x 16": 12466, "generate, 1, image": 36, "generate, 16 x 16, image": 5252, "encode, 4": 15.3,
          "train, 16, LoRA": 13227, "generate, 64": 1680, "generate, 256": 5460}


def quick_benchmark(args):
    """Rows as of `benchmark` for --minutes, in the order of what they tell; none begins behind the limit. transformers' setting
    is given (its static cache for one text, which it compiles; images fail with it), and each row is timed for seconds."""
    s, device = SIZES[args.size], "cuda" if torch.cuda.is_available() and args.size != "tiny" else "cpu"
    end = time.monotonic() + 60 * args.minutes
    if args.size != "tiny" or args.minutes > 0.1:
        checks = subprocess.run([sys.executable, Path(__file__).with_name("gpu_checks.py")], capture_output=True, text=True)
        yield "tests/gpu_checks.py:\n\n```\n" + checks.stdout + checks.stderr[-1500:] + "```"
    torch.manual_seed(0)
    model, tokenizer = M.load_model(Path(__file__).resolve().parents[1] / "assets/tiny-gp-l")
    if args.size != "tiny":
        model = random_model(M.SIZES[args.size], device)
    bandwidth, rate = measured_limits(device, model.language_model.lm_head.weight.dtype)
    limit, ours, P, N, L = Limit(model, bandwidth, rate), Ours(model, tokenizer, s), s["prompt"], s["new"], model.config.vision.image_size
    theirs = Theirs(model, tokenizer, s) if peft else None
    yield f"measured: {bandwidth / 1e9:.1f} GB/s read, {rate / 1e12:.3f} TFLOP/s matrix product"
    problems = [tasks.make("gp-l", tasks.ID_RULE, split="train", index=i, style="short") for i in range(16)]
    pattern = [[float(i % 2) for i in range(s["group"])] for _ in problems]
    static, dynamic, alone, adapted = "static" if device == "cuda" else None, None, "alone", ""

    def texts(n, length, image=False):
        ids = torch.randint(6, 470, (n, length), device=device)
        ids[:, 1] = model.config.text.vocab_size if image else ids[:, 1]
        return ids

    for kind, n, group, image, cache in (
            ("generate", 1, 1, False, static), ("generate", 16, 16, False, alone), ("lora", 0, 0, False, alone), ("generate", 16, 16, False, alone),
            ("ragged", 16, s["group"], False, alone), ("generate", 1, 1, True, alone), ("encode", s["encode"], 1, True, dynamic),
            ("train", s["train"], 1, False, dynamic), ("generate", 16, 16, True, alone), ("save", 0, 0, False, alone),
            ("generate", 16, 16, False, dynamic), ("grpo", s["problems"], s["group"], False, dynamic), ("generate", 64, 1, False, dynamic),
            ("generate", 256, 1, False, alone)):
        if time.monotonic() > end:
            return
        try:
            if kind == "lora":
                adapted = ", LoRA"
                for side in filter(None, (ours, theirs)):
                    side.add_lora()
                    side.model.train()
                continue
            if kind == "save":
                yield check_saving(model, tokenizer, device)
                continue
            if kind == "ragged":
                steps = [ours.ragged(problems[:n], group, N, seed) for seed in range(5)]
                yield (f"GRPO, {n} x {group} ragged prompts and answers, micro-batch {s['micro']}, seconds of rollout + update: " + ", ".join(
                    f"{a:.2f} + {b:.2f}" for a, b in steps) + " (04e1318 on an H200: 8.1 + 10.8, 4.7 + 8.2)" * (args.size == "11b"))
                continue
            ids = texts(n, P + N * (kind == "train"), image)
            tiles = torch.randn(n, 4, 3, L, L, device=device) if image else None
            unit, count, call, least = {
                "generate": ("tokens/s", n * group * N, lambda side: side.generate(ids, tiles, group, N), limit.generate(n, group, P, N, image)),
                "encode": ("images/s", n, lambda side: side.encode(tiles), limit.encode(n)),
                "train": ("tokens/s", ids.numel(), lambda side: side.train(ids, P), limit.train(n, P + N, N)),
                "grpo": ("episodes/s", n * group, lambda side: side.grpo(problems[:n], group, N, pattern[:n]),
                         limit.generate(n, group, P, N, False) + limit.train(n * group, P + N, N))}[kind]
            sides = [ours] if theirs is None or cache == alone else [ours, theirs]
            if len(sides) == 2:
                theirs.settings = []
                theirs.use("sdpa", cache)
            figures = compare(sides, call, min(s["seconds"], 5 * args.minutes), least=2)
            name = f"{kind}, {n}" + f" x {group}" * (group > 1) + ", image" * (image and kind != "encode")
            before = BEFORE.get(name + adapted * (kind == "train")) if args.size == "11b" else None
            if device == "cuda" and ours in figures and kind in ("generate", "train"):
                yield beside_dry_run(name + adapted, figures[ours][1], kind, n * group, group, image, P, N, bool(adapted))
            yield name + adapted + (f" (before: {before:,})" if before else ""), unit, count, [figures.get(side) for side in (ours, theirs)], least
        except Exception as error:  # the next row may do
            yield f"{kind}, {n} x {group}{adapted}: failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            gc.collect()


def beside_dry_run(name, peak, kind, rows, group, image, prompt, new, adapted):
    """What a call held at its peak beyond what was there, beside the estimate of assets/memory.py."""
    from assets import memory
    flags = f"--batch {rows} --group {group} --micro-batch {rows} --images {int(image)} --prompt-tokens {prompt} --new-tokens {new}"
    column = memory.estimate_memory(M.SIZES["11b"], memory.parse_args(f"{flags} --lora-rank {RANK * adapted}".split()))[
        "rollout" if kind == "generate" else "training"]
    said = sum(size for use, size in column.items() if use not in ("weights", "adapters", "optimizer"))
    return f"memory, {name}: peak {peak / 1e9:.2f} GB beyond the weights, dry run {said / 1e9:.2f} GB"


def check_saving(model, tokenizer, device):
    """Saving and loading of the whole model, adapters merged, in memory where there is room; the files come from the page cache."""
    size = sum(p.nbytes for p in model.parameters())
    room = Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 1.2 * size
    with tempfile.TemporaryDirectory(dir="/dev/shm" if room else None) as folder:
        saved = seconds(lambda: M.save_model(model, tokenizer, folder))
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        read = seconds(lambda: [path.read_bytes() and None for path in Path(folder).glob("*.safetensors")])
        took = seconds(lambda: M.load_model(folder, model.language_model.lm_head.weight.dtype, device))
    return (f"save: {size / 1e9:.2f} GB in {saved:.1f} s; load: in {took:.1f} s ({size / 1e9 / took:.2f} GB/s; reading the files alone: "
            f"{size / 1e9 / read:.2f} GB/s). Of 21.3 GB on an H200 04e1318 took 28.5 and 15 s")


def random_model(config, device):
    """Random bf16 weights (float32 on CPU) made on the device; gates open, so that images count."""
    with torch.device("meta"):
        model = M.LlamaVision(config)
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(0.5) if "gate" in name.rsplit(".", 1)[-1] else p.fill_(1.0) if p.dim() == 1 else p.normal_(std=0.02)
    return model


def show(row):
    """A row of figures as one line of markdown."""
    name, unit, count, figures, least = row
    first, second = (figures + [None])[:2]
    speed = lambda f: f"{count / f[0]:,.0f}" if f and count / f[0] >= 100 else f"{count / f[0]:.2f}" if f else "-"
    memory = lambda f: f"{f[1] / 2**20:,.0f}" if f and f[1] is not None else "-"
    ratio = f"{second[0] / first[0]:.2f}" if first and second else "-"
    share = f"{100 * least / first[0]:.0f} %" if first else "-"
    return f"| {name} | {unit} | {speed(first)} | {speed(second)} | {ratio} | {share} | {memory(first)} | {memory(second)} | {second[2] if second else '-'} |"


HEAD = ("| work | unit | ours | transformers | ratio | ours, share of limit | peak MiB, ours | theirs | their fastest setting |\n"
        "|---|---|---|---|---|---|---|---|---|")


def machine():
    """Hardware and versions, in one line each."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}" + (f", transformers {transformers.__version__}, peft {peft.__version__}" if peft else "")
    return [f"- hardware: {device}", f"- versions: Python {platform.python_version()}, {versions}"]


def street_views():
    """Yield lines: four street views in one picture, drawn and from a panorama, by the processor time of one core."""
    for style, tile in (("full", 560), ("short", 32)):
        walks = [tasks.make("virl-vl", "absolute", "day", "test", i, style=style, tile=tile) for i in range(20 if tile == 32 else 4)]
        shown = [(walk, i) for walk in walks for i in range(len(walk.actions))]
        walks[0].image, walks[0].drawn.clear()
        began = time.process_time()
        sizes = {walk.picture(i).size for walk, i in shown}
        yield f"drawn, tiles of {tile} pixels {sizes}: {len(shown) / (time.process_time() - began):.1f} a second"
    with tempfile.TemporaryDirectory() as folder:
        (views := Path(folder) / "street_views").mkdir()
        noise = Image.effect_noise((3328, 1664), 12).convert("RGB")
        Image.blend(noise, walks[0].image.resize(noise.size), 0.8).save(views / "a.jpg", quality=90)
        route = {"facing": 0, "stops": [["a", [], 90.0], ["a", [], None]]}
        data = {"routes": [route], "street_views": str(views), "rotations": {"a": 33.3}}
        (Path(folder) / "routes.json").write_text(json.dumps(data))
        began = time.process_time()
        for heading in range(3):
            panoramas.panorama_grid(folder, "a", heading, tasks.Scene(), 560)
        size = (views / "a.jpg").stat().st_size / 1e6
        yield f"from a JPEG of 3328 x 1664 pixels ({size:.1f} MB), four views of 640: {(time.process_time() - began) / 3:.2f} s each"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice; 1 where the machine is shared)")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no row after so many minutes; the most telling rows first")
    parser.add_argument("--views", action="store_true", help="measure street views only, without a model")
    parser.add_argument("--out", help="write the table there as markdown")
    args = parser.parse_args(argv)
    if args.views:
        return print(*street_views(), sep="\n")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    warnings.simplefilter("ignore")
    began = time.time()
    if peft:
        transformers.logging.set_verbosity_error()
    lines = []

    def say(line):
        lines.append(line)
        print(line, flush=True)
        if args.out:  # row by row: a run that is cut off leaves what it has
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).write_text(f"# Benchmark, {args.size}\n\n" + "\n".join(lines) + "\n")

    say(f"- command: `python tests/benchmark.py --size {args.size} --threads {torch.get_num_threads()}`, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC")
    for line in machine():
        say(line)
    for row in (quick_benchmark if args.minutes else benchmark)(args):
        say(show(row) if isinstance(row, tuple) else f"- {row}" + (f"\n\n{HEAD}" if row.startswith("measured") else ""))
    say(f"\n{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
