"""Parameters by part and memory by use, before a model is loaded: an estimate, nothing is made.

    python -m assets.memory --size 11b --group 16 --images 1
    python train_rl.py --model llama-11b ... --dry-run           # of exactly these flags; comes here
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import assets.habits  # noqa: E402, F401  so that runs of assets/make_base.py can be estimated
import tasks  # noqa: E402
import train_sft  # noqa: E402
from evaluate import (Episode, Parser, by_prompt, device_and_dtype, eval_batch, micro_batches, number,  # noqa: E402
                      prompt_style, run_main)
from model import (ADAPTER_CONFIG, AT_ONCE, SIZES, Config, LlamaVision, add_lora, config_from_json, count_parameters,  # noqa: E402
                   image_tokens, load_tokenizer, read_adapter, read_json, rounded)


def parameter_parts(model):
    """{part of the model: [parameters, tensors]}."""
    parts = {}
    cross = model.config.text.cross_attention_layers
    for name, p in model.named_parameters():
        part, layer = name.removeprefix("language_model.model.").split(".")[:2]
        if part == "layers":
            part = "cross layers" if int(layer) in cross else "self layers"
        elif part == "language_model":
            part = layer
        count = parts.setdefault(part, [0, 0])
        count[0] += p.numel()
        count[1] += 1
    return parts


class Load(NamedTuple):
    """What is computed side by side."""
    rows: int
    prompts: int  # different ones: each is computed once
    prompt: int  # tokens of the longest
    rest: int  # tokens behind the prompt, at most
    images: int  # of all prompts


def estimate_memory(config: Config, settings) -> dict[str, dict[str, float]]:
    """{"training", "recompute", "rollout": {use: bytes}}; settings: the flags of parse_args.

    Products of sizes. Those of training met three peaks on an H200 within 2 % (tests/test_checkpoints.py),
    before norms kept less; those of rollouts, whose code has changed, met none yet. bfloat16 means a GPU:
    lengths are rounded up, and a decoding step is a graph. Not in them: the CUDA context, workspaces,
    fragmentation, and here, unlike with --dry-run, prompts that rows of a training pass share.
    """
    s = settings
    with torch.device("meta"):
        model = LlamaVision(config)
        model.to(getattr(torch, s.dtype))
        if s.lora_rank:
            add_lora(model, s.lora_rank, 1.0)
    both = held_memory(model, OPTIMIZER[s.optimizer_state])
    images = max(1, s.micro_batch // s.group) * s.images
    learned = Load(s.micro_batch, s.micro_batch, s.prompt_tokens, s.new_tokens, images)
    prompts = s.batch // s.group
    played = Load(s.batch, prompts, s.prompt_tokens, s.new_tokens, prompts * s.images)
    return {"training": both | training_memory(model, learned, False),
            "recompute": both | training_memory(model, learned, True),
            "rollout": both | rollout_memory(model, played)}


def held_memory(model, state_bytes):
    """{use: bytes} that are there all the time; state_bytes: of the optimizer for a trained parameter."""
    adapters = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name)
    return {"weights": sum(p.nbytes for p in model.parameters()) - adapters, "adapters": adapters,
            "optimizer": count_parameters(model)["trained"] * state_bytes}


def training_memory(model, load, recompute):
    """{use: bytes} of a training pass over a Load, beside what is there all the time."""
    c, v = model.config.text, model.config.vision
    n = model.language_model.lm_head.weight.itemsize
    full = not train_sft.has_adapters(model)
    D, F, V = c.hidden_size, c.intermediate_size, c.vocab_size
    C, I = v.hidden_size, v.intermediate_size
    Q = c.num_attention_heads * c.head_dim
    KV = c.num_key_value_heads * c.head_dim
    own = c.num_hidden_layers - len(c.cross_attention_layers)
    cross = (c.num_hidden_layers - own) * (load.images > 0)  # without an image they are skipped
    P, slots = image_tokens(model.config), tower_slots(model)

    # Bytes that a token leaves in a layer for the backward pass: norms keep their input in float32,
    # trained ones their result too; then inputs of the projections, queries, keys, values and the
    # four of the MLP. With recompute only the input of the layer.
    norm = 4 + n * full
    own_layer = 2 * D * norm + n * (2 * D + 2 * Q + 2 * KV + 4 * F)
    cross_layer = own_layer + Q * norm + n * (2 * Q - 2 * KV)
    image_keys = KV * (norm + 2 * n)
    vision_layer = tower_layer(model, n)
    shared = load.prompts < load.rows
    scored = load.rows * load.rest  # without what is rounded up
    load = on_device(load, n)
    tokens = load.prompts * load.prompt + load.rows * load.rest
    repeated = shared * load.rows * (load.prompt + load.rest) * 2 * KV * n  # keys, values for each row
    logits, mlp = scored * V * (8 + n), tokens * 4 * F * n  # of the backward pass
    layers, beside = (own_layer, cross_layer, image_keys, vision_layer), mlp
    if recompute:
        layers, beside, repeated = (D * n, D * n, 0, C * n), mlp + tokens * own_layer + repeated, 0
    image = P * (D * n + cross * layers[2])
    if model.trains_vision:  # its layers, its output, its embeddings, the pixels
        image += slots * (v.num_hidden_layers + v.num_global_layers) * layers[3]
        image += P * n * (v.output_dim + 2 * C) + 12 * slots * v.patch_size**2
    token = own * layers[0] + cross * layers[1] + D * norm + 2 * c.head_dim * n
    kept = tokens * token + own * repeated + load.images * image + scored * V * 4
    trained = [p for p in model.parameters() if p.requires_grad]
    return {"gradients": sum(p.nbytes for p in trained), "kept for backward": kept,
            "other activations": max(logits, beside, encoding_memory(model, load.images) - kept)}


def tower_slots(model):
    """Patches of an image in the tower, filled up to a multiple of 8 in each tile."""
    v = model.config.vision
    return v.max_num_tiles * (v.tokens + -v.tokens % 8)


def on_device(load, n):
    """The Load with its lengths as a device has them that computes with n bytes a number."""
    length = partial(rounded, device="cuda" if n == 2 else "cpu")
    return load._replace(prompt=length(load.prompt), rest=length(load.rest))


def tower_layer(model, n):
    """Bytes that a patch leaves in a layer of the tower."""
    v = model.config.vision
    return n * (8 * v.hidden_size + 2 * v.intermediate_size)


def encoding_memory(model, images):
    """Bytes that frozen eyes need for so many images side by side, one layer after the other."""
    n, slots = model.language_model.lm_head.weight.itemsize, tower_slots(model)
    return 0 if model.trains_vision else images * slots * tower_layer(model, n)


def rollout_memory(model, load):
    """{use: bytes} of a rollout, beside what is there all the time. Prompts are read and images encoded
    once for a group, all of a batch at once; a group's prompt stays in the cache once."""
    c, n = model.config.text, model.language_model.lm_head.weight.itemsize
    cross = len(c.cross_attention_layers)
    KV = c.num_key_value_heads * c.head_dim
    pair = 2 * KV * n  # a key and a value of one token in one layer
    now = min(load.images, load.rows)  # on a walk only the latest picture stays in the cache
    seen = now * image_tokens(model.config)
    load, tokens = on_device(load, n), load.rows * (load.prompt + load.rest)
    if load.prompts < load.rows:
        tokens = load.prompts * load.prompt + load.rows * load.rest
    elif n == 2:
        tokens = load.rows * rounded(load.prompt + load.rest, "cuda")
    kept = {"KV cache": tokens * (c.num_hidden_layers - cross) * pair,
            "cross-attention K/V": seen * cross * pair,
            "image features": load.images * image_tokens(model.config) * n * c.hidden_size}
    drawn = load.rows * c.vocab_size
    if n == 2:  # the graph's own: logits and what is made of some of them; adapters in bfloat16
        adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        kept["decoding step"] = drawn * n + 16 * min(drawn, AT_ONCE) + adapters * n
    read = load.prompts * load.prompt  # tokens of prompts
    mlp = min(read, AT_ONCE // c.hidden_size) if n == 2 else read
    reading = n * max(read * 6 * c.hidden_size, read * 4 * c.hidden_size + mlp * 3 * c.intermediate_size)
    encoding = encoding_memory(model, now) - sum(kept.values())
    drawing = drawn * (n if n == 2 else 24)  # the first tokens are drawn outside of the graph
    return kept | {"other activations": max(reading, seen * KV * (8 + n), encoding, drawing)}


# ---- of the flags of a trainer -------------------------------------------------------------------


def load_of(episodes):
    """The Load of episodes that are computed side by side."""
    groups = by_prompt(episodes)
    prompts = [episode.response_mask.index(1) for episode in episodes]
    rest = max(len(episode.ids) - prompt for episode, prompt in zip(episodes, prompts))
    images = sum(max(len(episode.pictures) for episode in group) for group in groups)
    return Load(len(episodes), len(groups), max(prompts), rest, images)


def longest(problem, tokenizer, new_tokens):
    """An episode of a problem in which every answer has so many tokens, and all attempts are used; of
    problems that lead on, all positions are reached."""
    episode, done = Episode.start(problem, tokenizer), False
    while not done:
        episode.append_response([tokenizer.pad] * new_tokens)
        done = episode.verify(tokenizer, problem.expert() if problem.leads_on else "")
    return episode


def model_of(args):
    """(model without data, tokenizer) that a run with these flags of a trainer would train."""
    if not args.init_path:
        raise ValueError("--dry-run needs the directory of a model, which --fresh has not.")
    device, _ = device_and_dtype(args.device)
    base = Path(args.init_path)
    while (base / ADAPTER_CONFIG).exists():
        base = read_adapter(base).base
    with torch.device("meta"):
        model = LlamaVision(config_from_json(read_json(base / "config.json")))
        # Of a large model the run on a GPU is estimated, wherever this is done.
        large = device != "cpu" or count_parameters(model)["decoder"] > 1e9
        if args.optimizer == "adamw16" or args.lora_rank and large:
            model.to(torch.bfloat16)
        train_sft.choose_parameters(model, args)
    return model, load_tokenizer(base)


def estimate_run(args) -> dict[str, dict[str, float]]:
    """{"training", "rollout", "disk": {use: bytes}} of a run with these flags of a trainer. Its first
    batch is made, with answers as long as --max-new-tokens allows (of SFT with its demonstrations)."""
    model, tokenizer = model_of(args)
    train_sft.set_limits(args, tokenizer)
    style, group = prompt_style(model, tokenizer), getattr(args, "group", 1)
    count = min(getattr(args, "problems", args.eval_n), 64)
    problems = [tasks.make(args.task, args.rule, args.visual, "train", i, args.attempts, seed=args.seed, **style)
                for i in range(count)]
    played = [longest(problem, tokenizer, args.max_new_tokens) for problem in problems]
    learned = [episode for episode in played for _ in range(group)]
    if "demonstrators" in args:
        data = train_sft.demonstrations(args, style)
        learned = [data.episode(tokenizer, i) for i in range(args.batch)]
    both = held_memory(model, 4 if args.optimizer == "adamw16" else 8)
    if getattr(args, "kl_coef", 0) and not args.lora_rank:
        both["reference"] = both["weights"]
    passes = [training_memory(model, load_of(part), args.recompute)
              for part in micro_batches(learned, args.micro_batch, args.micro_tokens)]
    column = both | max(passes, key=lambda uses: sum(uses.values()))
    # Rollouts of training, of an evaluation: their rows as far as they are played side by side.
    whole, rollouts = load_of(played), []
    for rows, size, batch in ((getattr(args, "problems", 0) * group, group, args.rollout_batch),
                              (args.eval_n * (args.evals > 0), 1, eval_batch(args.task, args.rollout_batch, tokenizer))):
        prompts = min(rows, max(size, batch)) // size
        load = whole._replace(rows=prompts * size, prompts=prompts, images=whole.images * prompts // count)
        rollouts.append(rollout_memory(model, load) if prompts else {})
    if "group" in args:  # all pictures of its rollouts stay encoded, and on a GPU the graph of a step is kept
        column["image features"] = rollout_memory(model, whole)["image features"] * args.problems / count
        if "decoding step" in rollouts[0]:
            column["kept from the rollout"] = rollouts[0]["decoding step"] + rollouts[0]["KV cache"]
    return {"training": column, "rollout": both | max(rollouts, key=lambda uses: sum(uses.values())),
            "disk": {"checkpoints": train_sft.disk_bytes(model, args)}}


def report_run(args):
    """Print what `estimate_run` finds, and whether it fits."""
    found = estimate_run(args)
    disk = found.pop("disk")["checkpoints"] / 1e9
    for name, uses in found.items():
        shown = " + ".join(f"{use} {size / 1e9:.2f}" for use, size in uses.items() if size > 5e6)
        print(f"{name:9} {sum(uses.values()) / 1e9:8.2f} GB = {shown}")
    peak = max(sum(uses.values()) for uses in found.values()) / 1e9
    boards = [torch.cuda.get_device_properties(0).total_memory / 1e9] if torch.cuda.is_available() else [80, 141]
    fits = ", ".join(f"{'fits' if peak <= board else 'does not fit'} in {board:.0f} GB" for board in boards)
    print(f"peak      {peak:8.2f} GB: {fits}. {NOT_COUNTED}")
    print(f"disk      {disk:8.2f} GB for checkpoints, --keep {args.keep}, --evals {args.evals}")


NOT_COUNTED = "Not counted: fragmentation, the CUDA context, kernels' workspaces."
OPTIMIZER = {"float32": 8, "bfloat16": 4}  # bytes of AdamW's state for a trained parameter
FLAGS = {"batch": (64, 1, 4096, "rows of a rollout"),  # default, least, most
         "micro-batch": (8, 1, 4096, "rows of a training pass"),
         "group": (1, 1, 4096, "rows that share a prompt and its images"),
         "images": (1, 0, 16, "images of a prompt; all 4 slots of tiles are kept"),
         "prompt-tokens": (256, 1, 2**17, "of a prompt"),
         "new-tokens": (64, 1, 2**17, "of an answer"),
         "lora-rank": (32, 0, 4096, "of the adapters; 0: full fine-tuning")}


def parse_args(argv=None):
    """The flags. ValueError with one sentence for numbers out of range."""
    parser = Parser("Parameters by part, memory by use: an estimate.")
    flag = parser.add_argument
    flag("--size", choices=SIZES, default="11b", help="architecture")
    for name, (default, least, most, text) in FLAGS.items():
        number(parser, f"--{name}", default, least, most, text)
    flag("--recompute", action="store_true", help="no column without checkpointing")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
         help="of weights; full fine-tuning with AdamW has float32")
    flag("--optimizer-state", choices=OPTIMIZER, default="float32",
         help="AdamW's moments; bfloat16: as train_sft.py --optimizer adamw16 has them")
    flag("--run", metavar="JSON", help="arguments of a trainer, whose --dry-run gives them: of those instead")
    settings = parser.parse_args(argv)
    sizes = settings.micro_batch, settings.group
    if settings.batch % settings.group or max(sizes) % min(sizes):
        raise ValueError("--batch must be a multiple of --group; --micro-batch a multiple or a part of "
                         "it.")
    return settings


def main(argv=None):
    """Prints the estimate and returns {column: {use: bytes}}."""
    settings = parse_args(argv)
    if settings.run:
        return report_run(argparse.Namespace(**json.loads(settings.run)))
    with torch.device("meta"):
        parts = parameter_parts(LlamaVision(SIZES[settings.size]))
    parts["all"] = [sum(counts) for counts in zip(*parts.values())]
    for part, (count, tensors) in parts.items():
        print(f"{part:24}{count:>16,} parameters in {tensors:>3} tensors")
    columns = estimate_memory(SIZES[settings.size], settings)
    if settings.recompute:
        del columns["training"]

    def line(label, cells):
        print(f"{label:24}" + "".join(f"{cell:>12}" for cell in cells))
    print("\n" + ", ".join(f"{key} {value}" for key, value in vars(settings).items() if value is not None))
    line("GB (10^9 bytes)", columns)
    for use in columns["recompute"] | columns["rollout"]:
        line(use, [f"{column.get(use, 0) / 1e9:.3f}" for column in columns.values()])
    totals = [sum(column.values()) / 1e9 for column in columns.values()]
    line("all", [f"{total:.3f}" for total in totals])
    for limit in (80, 141):
        line(f"fits in {limit} GB", ["yes" if total <= limit else "no" for total in totals])
    print(f"An estimate, not measured on a GPU. {NOT_COUNTED}\n"
          "A board holds about 6 % more than its name says, for these.")
    return columns


if __name__ == "__main__":
    run_main(main)
