"""Make a shipped base: random weights, a tokenizer of the task's own texts, training on demonstrators with bad habits.

    python -m assets.make_base --task gp-l --fresh --steps 750 --optimizer muon --out runs/base/learn
    make base, base-vl, base-virl, base-virl-vl       # the commands of the four shipped bases

A base stands in for pretraining: it has met many rules and looks, and right behaviour is one of its modes, not the only
one. The flags are those of train_sft.py, and the loop is the same; besides:
  1. Tokenizer   learned from the mixture's own texts
  2. Weights     random ones, or random eyes for a model that has learned to read
  3. Muon        an optimizer for training from scratch, beside AdamW
  4. Command line
"""
import math
import random
import sys
from pathlib import Path

import torch
from torch import nn
from tokenizers import AddedToken, Regex, Tokenizer as BPE, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import assets.habits  # noqa: E402, F401  adds the demonstrators with bad habits
import tasks  # noqa: E402
import train_sft  # noqa: E402
from evaluate import Parser, run_main  # noqa: E402
from model import BOS, EOT, IMAGE, PAD, PARTS, SIZES, LlamaVision, Tokenizer, load_model  # noqa: E402

# ---- 1. Tokenizer --------------------------------------------------------------------------------

TINY_SPECIAL = (BOS, EOT, PAD, "<|user|>", "<|assistant|>", IMAGE)  # <|image|> last: its id lies outside lm_head


def train_tokenizer(texts, vocab_size=480):
    """The tiny tokenizer, learned from texts: cards, numbers, operators and directions stay tokens of their own,
    everything between them may merge across spaces. vocab_size counts the special tokens but <|image|>."""
    bpe = BPE(models.BPE())
    pieces = Regex(r"\d+|(?<![A-Za-z])[AJQK](?![A-Za-z])|[-+*/()]|(?:slightly )?(?:left|right)|(?:north|south)(?:east|west)?|east|west")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(TINY_SPECIAL) + 1, show_progress=False, min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    spare = vocab_size - bpe.get_vocab_size() - len(TINY_SPECIAL) + 1  # few texts give few merges: the rest is reserved
    names = [*TINY_SPECIAL[:-1], *(f"<|reserved_{i}|>" for i in range(spare)), TINY_SPECIAL[-1]]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(bpe)


# ---- 2. Weights ----------------------------------------------------------------------------------


def init_weights(model: LlamaVision, seed: int) -> LlamaVision:
    """Random weights for training from scratch: normal, 0.02 for embeddings, 0.6 / sqrt(inputs) for
    matrices (smaller where they write to the residual stream).

    Gates start at 0.5: at the zero of a fresh Llama-3.2-Vision a model that is trained from nothing
    ignores images.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = model.config.text.num_hidden_layers
    for name, p in model.named_parameters():
        if "gate" in name.rsplit(".", 1)[-1]:
            nn.init.constant_(p, 0.5)
        elif p.dim() == 1:
            nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight"))
            table = "embed" in name or "lm_head" in name
            scale = 0.6 / math.sqrt(p[0].numel()) / (math.sqrt(depth) if writes else 1)
            nn.init.normal_(p, std=0.02 if table else scale, generator=generator)
    return model


def fresh_model(args):
    """Random weights, and a tokenizer learned from the first texts of the mixture."""
    rules = train_sft.read_mixture("rules", args.rules)
    kinds = train_sft.read_mixture("demonstrators", args.demonstrators)
    visuals = train_sft.read_mixture("visuals", args.visuals) if args.visuals else None
    texts = []
    for index in range(2000):
        rng = random.Random(f"tokenizer/{index}")
        rule, kind, visual = rules.draw(rng), kinds.draw(rng), visuals.draw(rng) if visuals else None
        problem = tasks.make(args.task, rule, visual, args.split, index, style="short")
        texts += [problem.prompt, *problem.demonstrate(kind, rng)]
    tokenizer = train_tokenizer(texts, SIZES[args.model].text.vocab_size)
    return init_weights(LlamaVision(SIZES[args.model]), args.seed), tokenizer


def open_eyes(model, seed):
    """Random weights for tower, projector and cross layers: eyes for a model that has learned to read."""
    fresh = init_weights(LlamaVision(model.config), seed).state_dict()
    crossing = tuple(f"language_model.model.layers.{i}." for i in model.config.text.cross_attention_layers)
    eyes = {name: t for name, t in fresh.items() if name.startswith((PARTS["tower"], PARTS["projector"], *crossing))}
    model.load_state_dict(eyes, strict=False)


def load(args, device, dtype):
    """Model and tokenizer that the flags ask for."""
    if args.fresh:
        model, tokenizer = fresh_model(args)
        return model.to(device, dtype), tokenizer
    model, tokenizer = load_model(args.init_path, dtype, device)
    if args.fresh_eyes:
        open_eyes(model, args.seed)
    return model, tokenizer


# ---- 3. Muon -------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is the nearest orthogonal matrix, about: all directions are learned at one speed
    (Jordan et al., 2024, github.com/KellerJordan/Muon). Five steps of a Newton-Schulz iteration in the weights' own type;
    torch.optim.Muon takes bfloat16, which a CPU without it computes fifteen times slower. The size of an update is AdamW's
    at the same rate: RMS 0.2.
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


def make_optimizer(model, args):
    """With --optimizer muon: Muon for the layers' matrices and AdamW for the rest, about twice as fast where a model
    learns from nothing. Else as in train_sft.py."""
    if args.optimizer != "muon":
        return train_sft.make_optimizer(model, args)
    if args.lora_rank:
        raise ValueError("--optimizer muon is for training from scratch: leave out --lora-rank, or use adamw.")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [name for name, p in trained.items() if p.dim() == 2 and (".layers." in name or name.startswith("multi_modal"))]
    rest = [p for name, p in trained.items() if name not in matrices]
    return Pair(Muon([trained[name] for name in matrices], lr=args.lr, weight_decay=args.weight_decay),
                torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay))


# ---- 4. Command line -----------------------------------------------------------------------------


def parse_args(argv=None):
    """Command line of base making: that of SFT and a few flags more."""
    parser = Parser("Train a base from scratch, or with new eyes, on demonstrators with bad habits.")
    parser.epilog = train_sft.metrics_help(train_sft.METRICS)
    train_sft.shared_arguments(parser, steps=300, lr=3e-4, schedule="cosine", out="runs/base",
                               optimizers=("adamw", "adamw16", "muon"))
    train_sft.mixture_arguments(parser, ["expert"])
    g = parser.add_argument_group("base")
    g.add_argument("--split", choices=("train", "base"), default="train", help="base: as train, but with rules under which "
                   "face cards give a hand the numbers of a held-out one; it stands in for pretraining")
    g.add_argument("--fresh", action="store_true", help="random weights and a new tokenizer for --model tiny or small")
    g.add_argument("--fresh-eyes", action="store_true", help="random weights for the tower, the projector and the cross layers")
    args = train_sft.finish_arguments(parser, argv)
    train_sft.check_mixtures(args)
    if args.fresh and (args.lora_rank or args.init):
        raise ValueError("--fresh trains all of a new model: leave out --lora-rank and --init.")
    if args.fresh and args.model not in ("tiny", "small"):
        raise ValueError("--fresh makes a model from nothing: --model must be tiny or small.")
    return train_sft.or_resume(parser, args)


def main(argv=None):
    """Train a base; returns the scores of the last evaluation."""
    args = parse_args(argv)
    return train_sft.train(train_sft.start_run(args, load, make_optimizer), args)


if __name__ == "__main__":
    run_main(main)
