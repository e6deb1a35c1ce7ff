"""model.py against transformers 5.23 with Meta's semantics and with its own; the fixtures are made by make_fixtures.py."""

import io
import types
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import make_fixtures as fx
import model as M
from make_fixtures import CASES, FIXTURES, PAD

SEMANTICS = {"meta": {}, "hf": {"vision_taps": "output", "mask_prefix_attention": False}}


@cache
def fixture(name):
    with np.load(FIXTURES / f"{name}.npz") as data:
        return {k: torch.from_numpy(data[k]) for k in data.files if data[k].dtype.kind != "U"} | {
            k: data[k] for k in data.files if data[k].dtype.kind == "U"}


def build(name, semantics="meta", seed=None, module=M):
    """The case's model, of model.py or of a mutant of it."""
    config = replace(CASES[name][0], **SEMANTICS[semantics])
    with torch.device("meta"):
        model = module.LlamaVision(config)
    weights = fx.random_weights({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed or CASES[name][1])
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_()


def error(ours, theirs):
    """Largest difference, relative to the root mean square of the reference."""
    assert ours.shape == theirs.shape
    if not torch.isfinite(ours).all():
        return float("inf")
    return ((ours - theirs).abs().max() / theirs.square().mean().sqrt().clamp(min=1e-12)).item()


def run(model, name):
    """ids, lengths, context and hidden states of the case's batch."""
    ids, lengths, chosen, tiles, ratio_ids = fx.batch(name)
    context = model.see(tiles, ratio_ids)
    return ids, lengths, chosen, tiles, ratio_ids, context


def differences(name, semantics, module=M):
    """Relative errors of features, cross-attention states, logits and loss, and the largest of all gradients."""
    want, model = fixture(f"{name}-{semantics}"), build(name, semantics, module=module)
    ids, lengths, chosen, tiles, ratio_ids, context = run(model, name)
    exists = ratio_ids > 0 if semantics == "meta" else torch.ones_like(ratio_ids, dtype=torch.bool)
    tile_mask = torch.tensor([1, 1, 2, 3, 4, 2, 4, 3, 4])[ratio_ids][..., None] > torch.arange(4)
    features = model.vision_model(tiles[exists], ratio_ids[exists], tile_mask[exists])
    states = context.features.unflatten(1, (ratio_ids.shape[1], -1))
    logits = model.logits(model(ids, image=context))
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    log_probs, _ = model.log_probs(ids, chosen, image=context)
    loss = -log_probs.mean()
    loss.backward()
    found = {"features": error(features, want["features"][exists]), "states": error(states[exists], want["states"][exists]),
             "logits": error(logits[real], want["logits"][real]), "loss": error(loss, want["loss"])}
    if semantics == "meta":
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        found["grad"] = max(error(g, want[f"grad {n}"]) for n, g in grads.items())
    return found


LIMITS = {"features": 1e-4, "states": 1e-4, "logits": 1e-4, "loss": 1e-4, "grad": 1e-3}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_reference(name, semantics):
    found = differences(name, semantics)
    print(name, semantics, found)
    assert all(found[k] <= LIMITS[k] for k in found), found
