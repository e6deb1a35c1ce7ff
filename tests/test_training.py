"""Episodes, losses, advantages and the two trainers: numbers worked by hand, and every path that must agree with another."""

import copy
import dataclasses
import json
import math
import random
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate as E
import model as M
import tasks
import train_rl as RL
import train_sft as SFT
from assets import make_base, report, study as studies
from conftest import load_tensors, standing


def problem(index=0, attempts=3, rule="10"):
    return tasks.make("gp-l", rule, index=index, attempts=attempts, style="short")


# ---- episodes

def test_literal_mask_of_a_three_turn_episode(tokenizer):
    """Wrong, cut off, then right: every sampled token with its stop token has mask 1, and nothing else has."""
    p, e = problem(), None
    e = E.Episode(p)
    prompt = tokenizer.prompt(p.prompt)
    e.append_context(prompt)
    wrong, right = tokenizer.encode("no idea"), tokenizer.encode(p.expert())
    cut = tokenizer.encode('{"cards"')
    expected, ids = [0] * len(prompt), list(prompt)
    for response, stop in ((wrong, True), (cut, False), (right, True)):
        sampled = response + [tokenizer.eot] * stop
        e.append_response(sampled, [-0.5] * len(sampled))
        done = e.verify(tokenizer, tokenizer.decode(sampled))
        expected += [1] * len(sampled)
        ids += sampled
        if not done:
            words = ([] if stop else [tokenizer.eot]) + tokenizer.turn(e.turns[-1]["feedback"])
            expected += [0] * len(words)
            ids += words
    assert done and [t["outcome"] for t in e.turns] == ["illegal", "illegal", "correct"]
    assert e.ids == ids and e.response_mask == expected
    assert len(e.log_probs) == len(ids) and sum(e.log_probs) == -0.5 * sum(expected)
    assert ids[-1] == tokenizer.eot and expected[-1] == 1
    assert e.total() == -3 - 3 + 5 and e.total(0.5) == -3 - 1.5 + 1.25


def test_response_that_is_only_a_stop_token(tokenizer):
    e = E.Episode(problem(attempts=1))
    e.append_context(tokenizer.prompt(e.problem.prompt))
    e.append_response([tokenizer.eot])
    assert e.verify(tokenizer, tokenizer.decode([tokenizer.eot])) and e.response_mask[-1] == 1
    assert e.turns[0]["response"] == "" and e.turns[0]["outcome"] == "illegal"


def random_rollout(model, tokenizer, group=3, attempts=3, temperature=0.8, new=6, problems=4):
    generator = torch.Generator().manual_seed(3)
    return E.rollout(model, tokenizer, [problem(i, attempts) for i in range(problems)], group,
                     M.Sampling(new, temperature, generator, batch=7))


def test_rollout_log_probs_are_training_log_probs(model, tokenizer):
    """Over three turns, at a temperature other than 1, in any batch: the ratio before an update is 1."""
    groups = random_rollout(model, tokenizer)
    episodes = [e for g in groups for e in g]
    assert len(groups) == 4 and all(len(g) == 3 for g in groups)
    assert max(len(e.turns) for e in episodes) == 3
    for part in (episodes, episodes[5:6]):
        ids, chosen, old = E.to_batch(part, tokenizer.pad, "cpu")
        with torch.no_grad():
            log_probs = model.log_probs(ids, chosen, 0.8)
            other = model.log_probs(ids, chosen, 1.0)
        assert (log_probs - old[chosen]).abs().max() < 1e-4
        assert (other - old[chosen]).abs().max() > 1e-2


def hang_pictures(model, monkeypatch):
    """Pictures on two of four problems, and gates that let them through."""
    pictures = {}
    monkeypatch.setattr(tasks.GeneralPoints, "image", property(lambda self: pictures.get(self.prompt)))
    for i, shade in ((0, 40), (2, 200)):
        noise = random.Random(shade).randbytes(3 * 30 * 20)
        pictures[problem(i).prompt] = Image.frombytes("RGB", (30, 20), noise)
    for name, p in model.named_parameters():
        if "gate" in name.rsplit(".", 1)[-1]:
            p.data.fill_(0.5)


def weighted_gradients(model, episodes, tokenizer, size):
    """Values and gradients of log-probs with a weight each, `size` rows at a time, and the number of tokens computed. The
    pictures are encoded anew, with gradients."""
    model.zero_grad()
    values, computed = {}, []
    hook = model.language_model.model.embed_tokens.register_forward_hook(lambda layer, args, out: computed.append(args[0].numel()))
    for part in E.micro_batches(episodes, size):
        ids, chosen, _ = E.to_batch(part, tokenizer.pad, "cpu")
        log_probs = model.log_probs(ids, chosen, 0.8, E.images_for(model, part))
        rows = log_probs.split(chosen.sum(1).tolist())
        values |= {id(e): row.detach() for e, row in zip(part, rows)}
        sum((row * torch.linspace(-1, 2, len(row))).sum() for row in rows).backward(retain_graph=True)
    hook.remove()
    return torch.cat([values[id(e)] for e in episodes]), gradients(model), sum(computed)


@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize("change", ["", "recompute", "lora"])
def test_prompts_computed_once_give_the_same_values_and_gradients(model, tokenizer, pictures, change, monkeypatch):
    """Against row by row: three turns, ragged prompts, groups of three, two and one, split over micro-batches or not."""
    if pictures:
        hang_pictures(model, monkeypatch)
    if change == "lora":
        M.add_lora(model, 2, 4.0)
        for name, p in model.named_parameters():
            p.data += 0.1 * ("lora_B" in name)
        model.vision_model.requires_grad_(True)
    model.recompute(change == "recompute")
    groups = random_rollout(model, tokenizer)
    for e in groups[1] + groups[2]:  # longer prompts
        e.ids[1:1], e.response_mask[1:1], e.log_probs[1:1] = [7, 8, 9], [0] * 3, [0.0] * 3
    assert len({g[0].response_mask.index(1) for g in groups}) > 1 and max(len(e.turns) for g in groups for e in g) == 3
    episodes = groups[0] + groups[1][:2] + groups[2][1:] + groups[3][:1]
    values, wanted, all_tokens = weighted_gradients(model, episodes, tokenizer, 1)
    for size in (2, 3, 5, 8):
        shared, grads, tokens = weighted_gradients(model, episodes, tokenizer, size)
        assert (shared - values).abs().max() < 1e-5 * values.abs().max()
        assert grads.keys() == wanted.keys() and (size < 8 or tokens < all_tokens)
        rounding = 2e-8 * max(grad.norm() for grad in wanted.values())  # of float32: other CPUs add up in another order
        for name, grad in wanted.items():
            assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + max(rounding, 1e-6), name


def test_whole_groups_share_a_micro_batch_where_they_fit(model, tokenizer):
    groups = random_rollout(model, tokenizer)
    for size, sizes in ((12, [12]), (7, [6, 6]), (3, [3] * 4), (2, [2, 1] * 4)):
        parts = E.micro_batches([e for g in zip(*groups) for e in g], size)
        assert [len(p) for p in parts] == sizes or size == 2 and max(map(len, parts)) == 2
        assert sorted(id(e) for p in parts for e in p) == sorted(id(e) for g in groups for e in g)
        assert all(len({id(p) for p in parts if any(e in p for e in g)}) == -(-3 // size) for g in groups)


def test_micro_batches_keep_to_their_tokens(model, tokenizer):
    """A prompt counts once for its group, every row as long as the group's longest; one episode may be longer than all."""
    groups = random_rollout(model, tokenizer)
    episodes = [e for g in zip(*groups) for e in g]
    prompt = max(e.response_mask.index(1) for e in episodes)
    rest = max(len(e.ids) - e.response_mask.index(1) for e in episodes)
    for tokens in (1, prompt + rest, prompt + 2 * rest, 2 * (prompt + 3 * rest), 10**6):
        parts = E.micro_batches(episodes, 256, tokens)
        assert sorted(id(e) for p in parts for e in p) == sorted(map(id, episodes)) and all(parts)
        for part in parts:
            used = sum(len(g[0].ids[:g[0].response_mask.index(1)]) + len(g) * max(len(e.ids) - e.response_mask.index(1) for e in g)
                       for g in E.by_prompt(part))
            assert used <= tokens or len(part) == 1
        assert len(parts) == {1: 12, 10**6: 1}.get(tokens, len(parts))
    assert E.micro_batches(episodes, 7, 10**6) == E.micro_batches(episodes, 7)


def test_gradients_do_not_depend_on_the_tokens_of_a_micro_batch(model, tokenizer):
    groups, results = random_rollout(model, tokenizer), []
    advantage = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 60, 100, 10**6):
        model.zero_grad()
        metrics = RL.rl_backward(model, groups, advantage, loss_settings(micro_tokens=tokens), tokenizer.pad)
        assert 0 <= metrics["ratio_error_mean"] <= metrics["ratio_error"] < 1e-4
        results.append((metrics["loss"], gradients(model)))
        model.zero_grad()
        results.append((SFT.sft_backward(model, sum(groups, []), tokenizer.pad, 256, tokens)["loss"], gradients(model)))
    for i, (loss, grads) in enumerate(results):
        first_loss, first = results[i % 2]
        assert loss == pytest.approx(first_loss, rel=1e-4, abs=1e-6)
        assert all(torch.allclose(grad, first[name], atol=1e-5, rtol=1e-3) for name, grad in grads.items())


def test_few_parameters_are_read_to_see_whether_something_moved(model, monkeypatch):
    M.add_lora(model, 2, 1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    read, real = [], SFT.parameter_sums
    monkeypatch.setattr(SFT, "parameter_sums", lambda ps: read.append(len(ps)) or real(ps))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert SFT.update(model, torch.optim.AdamW(trained), 1e-3, 1.0)["changed"] and read == [8, 8] and len(trained) > 16


def test_a_picture_is_encoded_once_and_seen_in_every_turn_and_in_training(model, tokenizer, monkeypatch):
    """Pictures on two of four problems: rollout and training log-probs agree, over three turns, and see the right picture."""
    encoded = []
    hang_pictures(model, monkeypatch)
    model.vision_model.requires_grad_(False), model.multi_modal_projector.requires_grad_(False)
    real = M.VisionTower.forward
    monkeypatch.setattr(M.VisionTower, "forward", lambda self, tiles, *rest: encoded.append(len(tiles)) or real(self, tiles, *rest))
    groups = random_rollout(model, tokenizer)
    assert sum(encoded) == 2
    episodes = [e for g in groups for e in g]
    assert [M.IMAGE in [tokenizer.bpe.id_to_token(i) for i in e.ids] for e in episodes] == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    for part in (episodes, episodes[6:9], episodes[2:8], list(reversed(episodes))):
        ids, chosen, old = E.to_batch(part, tokenizer.pad, "cpu")
        with torch.no_grad():
            assert (model.log_probs(ids, chosen, 0.8, E.images_for(model, part)) - old[chosen]).abs().max() < 1e-4
            swapped = [dataclasses.replace(e, encoded=e.encoded and (episodes[6] if e in episodes[:3] else episodes[0]).encoded,
                                           pictures=e.pictures and [e]) for e in part]
            other = model.log_probs(ids, chosen, 0.8, E.images_for(model, swapped)) - old[chosen]
        shown = torch.tensor([bool(e.encoded) for e in part])[:, None].expand_as(chosen)[chosen]
        assert other[shown].abs().max() > 1e-3 and (other[~shown].abs() < 1e-4).all()
    assert sum(encoded) == 2


def test_a_trained_tower_sees_in_training_what_it_saw_in_the_rollout(model, tokenizer, monkeypatch):
    """Encoded again with gradient, each picture once a micro-batch: the same log-probs, and every part learns."""
    encoded = []
    hang_pictures(model, monkeypatch)
    real = M.VisionTower.forward
    monkeypatch.setattr(M.VisionTower, "forward", lambda self, tiles, *rest: encoded.append(len(tiles)) or real(self, tiles, *rest))
    episodes = [e for g in random_rollout(model, tokenizer) for e in g]
    for part in (episodes, episodes[2:8], episodes[3:6]):
        ids, chosen, old = E.to_batch(part, tokenizer.pad, "cpu")
        log_probs = model.log_probs(ids, chosen, 0.8, E.images_for(model, part))
        assert (log_probs - old[chosen]).abs().max() < 1e-4
    assert encoded == [1, 1, 2, 2]
    grads = []
    for size in (12, 4, 1):
        model.zero_grad()
        SFT.sft_backward(model, episodes, tokenizer.pad, size)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert all(grads[-1][n].abs().sum() > 0 for n in ("vision_model.patch_embedding.weight", "multi_modal_projector.weight"))
    for n, g in grads[0].items():
        assert all((g - other[n]).norm() <= 1e-4 * g.norm() + 1e-7 for other in grads[1:]), n


@pytest.mark.parametrize("task, lora, train, learn", [
    ("gp-l", 0, None, {"decoder"}), ("gp-vl", 0, None, {"decoder", "cross", "projector", "tower"}), ("gp-vl", 2, None, {"decoder", "cross"}),
    ("gp-vl", 0, ["tower"], {"tower"}), ("gp-vl", 2, ["projector", "tower"], {"projector", "tower"}),
    ("gp-vl", 0, ["decoder"], {"decoder", "cross"})])
def test_the_parts_that_are_trained(model, task, lora, train, learn):
    args = SimpleNamespace(task=task, lora_rank=lora, lora_alpha=4.0, train=train, optimizer="adamw", lr=1e-3, weight_decay=0.0)
    SFT.choose_parameters(model, args)
    assert SFT.make_optimizer(model, args).param_groups
    part = lambda name: "tower" if name.startswith("vision") else "projector" if name.startswith("multi") else (
        "cross" if ".layers.2." in name else "decoder")  # layer 2 is the cross layer of this config
    assert {part(n) for n, p in model.named_parameters() if p.requires_grad} == learn
    assert model.trains_vision == bool({"tower", "projector"} & learn)


def test_trained_ids_are_sampled_ids(model, tokenizer):
    """What is trained was sampled, token by token; the verifier's words are exactly their encoding."""
    for e in (e for g in random_rollout(model, tokenizer) for e in g):
        ids, runs = list(e.ids), []
        for i, m in enumerate(e.response_mask):
            if i == 0 or m != e.response_mask[i - 1]:
                runs.append((m, []))
            runs[-1][1].append(ids[i])
        assert [m for m, _ in runs] == [0, 1] * len(e.turns)
        for turn, (_, response) in zip(e.turns, runs[1::2]):
            assert tokenizer.decode(response) == turn["response"]
            assert tokenizer.eot not in response[:-1]
        for turn, (_, words), (_, before) in zip(e.turns, runs[2::2], runs[1::2]):
            closing = [] if before[-1] == tokenizer.eot else [tokenizer.eot]
            assert words == closing + tokenizer.turn(turn["feedback"])


def test_greedy_rollout_does_not_depend_on_the_batch(model, tokenizer):
    play = lambda rows, n: [g[0].ids for g in E.rollout(model, tokenizer, [problem(i) for i in range(n)], 1, M.Sampling(6, 0.0, None, rows))]
    assert play(1, 4) == play(3, 4) == play(64, 6)[:4]


def test_base_weights_are_untouched_by_a_rollout(model, tokenizer):
    M.add_lora(model, 2, 4.0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random_rollout(model, tokenizer)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_solved_episodes_leave_and_the_others_go_on(model, tokenizer, monkeypatch):
    """A verifier that accepts the first episode of every group at once: its ids stay short, the others play on."""
    real, seen = tasks.GeneralPoints.step, []

    def step(self, response):
        seen.append(response)
        if self.attempt == 0 and len(seen) % 3 == 1:
            self.attempt, self.done = 1, True
            return tasks.Step(5.0, True, "", "correct")
        return real(self, response)
    monkeypatch.setattr(tasks.GeneralPoints, "step", step)
    groups = E.rollout(model, tokenizer, [problem(i) for i in range(2)], 3, M.Sampling(5, 1.0, torch.Generator().manual_seed(0)))
    assert [[len(e.turns) for e in g] for g in groups] == [[1, 3, 3], [1, 3, 3]]
    ids, chosen, old = E.to_batch([e for g in groups for e in g], tokenizer.pad, "cpu")
    assert (model.log_probs(ids, chosen) - old[chosen]).abs().max() < 1e-4


# ---- walks: another picture at every position

@pytest.fixture(scope="module")
def walker():
    """A tiny model of random weights that heeds its pictures, and a tokenizer of walks."""
    texts = [text for i in range(40) for text in (walk(i).prompt, *walk(i).demonstrate("careless", random.Random(i)))]
    model = make_base.init_weights(M.LlamaVision(M.SIZES["tiny"]), 0)
    return model, make_base.train_tokenizer(texts, M.SIZES["tiny"].text.vocab_size)


def walk(index, attempts=2, name="virl-vl", **more):
    return tasks.make(name, "absolute", index=index, attempts=attempts, style="short", **more)


def judged_by_chance(monkeypatch):
    """A verifier that lets two thirds of all answers pass, so that a random model gets around."""
    def judge_walk(response, here, rule, style):
        right = random.Random(f"{response}/{here.place}").random() < 0.67
        return tasks.Walked(("correct" if here.action == "stop" else "right_action") if right else "wrong_action",
                            "right" if right else "turn", "", True)
    monkeypatch.setattr(tasks, "judge_walk", judge_walk)


def random_walks(walker, monkeypatch, group=3):
    judged_by_chance(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    groups = E.rollout(*walker, [walk(i) for i in range(4)], group, M.Sampling(5, 1.0, generator, batch=7))
    episodes = [e for g in groups for e in g]
    assert len({len(e.pictures) for e in episodes}) > 2 and any(t["outcome"] == "wrong_action" for t in episodes[0].turns + episodes[1].turns)
    return groups, episodes


def test_a_picture_of_every_position_is_encoded_once_and_only_the_latest_stays_in_the_cache(walker, monkeypatch):
    model, tokenizer = walker
    encoded, kept, real, generate = [], [], M.VisionTower.forward, E.generate

    def watched(model, cache, *rest):
        tokens = 4 * model.config.vision.tokens  # of a picture
        kept.append({cache.image.tiles.shape[1], cache.image.features.shape[1] / tokens, *(
            k.shape[2] / tokens for k, _ in cache.image.cross.values())})
        assert (cache.shown.sum(1) <= 1).all() and len(cache.image.tiles) <= len(cache.length)
        return generate(model, cache, *rest)
    monkeypatch.setattr(M.VisionTower, "forward", lambda self, tiles, *rest: encoded.append(len(tiles)) or real(self, tiles, *rest))
    monkeypatch.setattr(E, "generate", watched)
    groups, episodes = random_walks(walker, monkeypatch)
    assert all(sizes == {1} for sizes in kept)
    assert sum(encoded) == sum(max(len(e.pictures) for e in g) for g in groups)
    image = tokenizer.bpe.token_to_id(M.IMAGE)
    for group in groups:
        longest = max(group, key=lambda e: len(e.pictures))
        for e in group:
            assert e.ids.count(image) == len(e.pictures) == len(e.encoded) == 1 + sum(t["outcome"] == "right_action" for t in e.turns)
            assert all(a is b for a, b in zip(e.pictures, longest.pictures)) and e.encoded == longest.encoded[: len(e.encoded)]
            assert all(p.tobytes() == tasks.draw_grid("train-0", "short", here.place, here.heading, e.problem.look, 32).tobytes()
                       for p, here in zip(e.pictures, e.problem.route.rail))


@pytest.mark.parametrize("learns", [False, True])
def test_walks_have_the_same_log_probs_in_rollout_and_training(walker, monkeypatch, learns):
    model, tokenizer = walker
    for part in (model.vision_model, model.multi_modal_projector):
        part.requires_grad_(learns)
    _, episodes = random_walks(walker, monkeypatch)
    for size in (12, 5, 1):
        for part in E.micro_batches(episodes, size):
            ids, chosen, old = E.to_batch(part, tokenizer.pad, "cpu")
            with torch.no_grad():
                assert (model.log_probs(ids, chosen, 1.0, E.images_for(model, part)) - old[chosen]).abs().max() < 1e-4
    model.requires_grad_(True)


def test_a_token_sees_the_picture_of_its_position(walker, monkeypatch):
    """With another picture at one position, what was written before it stays as it was and what is written there changes."""
    model, tokenizer = walker
    _, episodes = random_walks(walker, monkeypatch)
    for e in [e for e in episodes if len(e.pictures) > 2][:3]:
        for k in range(len(e.pictures)):
            other = dataclasses.replace(e, pictures=[*e.pictures], encoded=[])
            other.pictures[k] = Image.effect_noise((64, 64), 90).convert("RGB")
            ids, chosen, old = E.to_batch([e], tokenizer.pad, "cpu")
            with torch.no_grad():
                changed = (model.log_probs(ids, chosen, 1.0, E.images_for(model, [other])) - old[chosen]).abs() > 1e-5
            place = [i for i, token in enumerate(e.ids) if token == tokenizer.bpe.token_to_id(M.IMAGE)][k]
            before = sum(e.response_mask[:place])
            assert not changed[:before].any() and changed[before]


def test_gradients_of_walks_do_not_depend_on_the_micro_batch(walker, monkeypatch):
    model, tokenizer = walker
    _, episodes = random_walks(walker, monkeypatch)
    values, wanted, _ = weighted_gradients(model, episodes, tokenizer, 1)
    for size in (4, 12):
        shared, grads, _ = weighted_gradients(model, episodes, tokenizer, size)
        assert (shared - values).abs().max() < 1e-5 * values.abs().max() and grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name
    assert wanted["vision_model.patch_embedding.weight"].abs().sum() > 0


def by_rule_and_chance(monkeypatch):
    """A verifier whose verdict on any text depends on the rule that it judges by."""
    def judge_walk(response, here, rule, style):
        right = rule == "absolute" and response == "" or random.Random(f"{response}/{here.place}/{rule}").random() < 0.5
        return tasks.Walked(("correct" if here.action == "stop" else "right_action") if right else "wrong_action",
                            "right" if right else "turn", "", True)
    monkeypatch.setattr(tasks, "judge_walk", judge_walk)


@pytest.mark.parametrize("name", ["virl-l", "virl-vl"])
def test_teacher_forced_answers_are_those_given_after_the_right_history(walker, name, monkeypatch):
    """Every position once; the answer is the one that the model gives when asked there alone, judged as the row says."""
    model, tokenizer = walker
    histories = [[standing(walk(i, name=name), k) for k in range(len(walk(i).route.rail))] for i in range(3)]
    outcomes = {}
    for judge in ("absolute", "relative"):
        problems = [walk(i, name=name, judged_by=judge) for i in range(3)]
        real = tasks.judge_walk
        for p in problems:  # the way is the expert's, whatever the verdicts
            monkeypatch.setattr(type(p), "advance", advanced(real))
        by_rule_and_chance(monkeypatch)
        for (e,), p, history in zip(E.rollout(*walker, problems, 1, M.Sampling(12, 0.0), forced=True), problems, histories):
            assert [t["position"] for t in e.turns] == [*range(len(p.route.rail))] and not any(e.response_mask)
            for t, (there, texts) in zip(e.turns, history):
                asked = tokenizer.prompt(p.prompt, image=name == "virl-vl")
                for k, text in enumerate(texts):
                    asked += tokenizer.turn(text, image=name == "virl-vl") if k % 2 else [*tokenizer.encode(text), tokenizer.eot]
                assert e.ids[: len(asked)] == asked
                (alone,), _ = answer(model, tokenizer, asked, [there.picture(k) for k in range(there.position + 1)] * (name == "virl-vl"))
                assert tokenizer.decode(alone) == t["response"]
                assert t["outcome"] == tasks.judge_walk(t["response"], there.route.rail[there.position], p.judged_by, p.style).outcome
            outcomes.setdefault(judge, []).extend(t["outcome"] for t in e.turns)
        monkeypatch.undo()
    assert outcomes["absolute"] != outcomes["relative"] and len({*outcomes["absolute"]} - {"correct"}) == 2


def advanced(real):
    """Navigation.advance with the real verifier in place of a stub."""
    def advance(self, wanted=tasks.Navigation.advance):
        stub, tasks.judge_walk = tasks.judge_walk, real
        try:
            return wanted(self)
        finally:
            tasks.judge_walk = stub
    return advance


def answer(model, tokenizer, ids, pictures):
    """The greedy answer to a conversation, in a cache of its own."""
    with torch.no_grad():
        seen = E.merge_contexts([E.encode_pictures(model, pictures)])
        cache = M.Cache(model, 1, len(ids) + 12, seen)
        logits = model.extend(cache, torch.tensor([ids]), torch.tensor([len(ids)]))
        return M.generate(model, cache, logits, M.Sampling(12, 0.0), tokenizer.stop_ids)


def test_routes_that_begin_alike_keep_their_own_pictures(walker):
    """Routes 1 and 4 of the city train-87 share their first three positions and part at the fourth."""
    model, tokenizer = walker
    pair = [E.Episode.demonstrated(p, tokenizer, p.demonstrate("expert", random)[::2]) for p in (walk(1741), walk(1744))]
    assert [a.tobytes() == b.tobytes() for a, b in zip(*(e.pictures for e in pair))][:4] == [True, True, True, False]
    with torch.no_grad():
        alone = torch.cat([model.log_probs(*E.to_batch([e], tokenizer.pad, "cpu")[:2], 1.0, E.images_for(model, [e])) for e in pair])
        both = model.log_probs(*E.to_batch(pair, tokenizer.pad, "cpu")[:2], 1.0, E.images_for(model, pair))
    assert (alone - both).abs().max() < 1e-4


def test_one_picture_after_the_other_is_refused_where_first_tokens_look_at_all(walker, monkeypatch):
    model, tokenizer = walker
    judged_by_chance(monkeypatch)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, mask_prefix_attention=False))
    with pytest.raises(ValueError, match="mask_prefix_attention to true"):
        E.rollout(model, tokenizer, [walk(i) for i in range(4)], 2, M.Sampling(5, 1.0, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", tasks.TASKS['virl-l'].problem.DEMONSTRATORS)
def test_a_demonstrated_walk_is_the_demonstrators_words_with_a_picture_for_each_position(walker, kind):
    _, tokenizer = walker
    for i in range(6):
        texts, p = walk(i).demonstrate(kind, random.Random(i)), walk(i)
        e = E.Episode.demonstrated(p, tokenizer, texts[::2])
        outcomes = [t["outcome"] for t in e.turns]
        wanted = tokenizer.prompt(p.prompt, image=True)
        for k, text in enumerate(texts):
            moved = k % 2 == 1 and outcomes[k // 2] == "right_action"
            wanted += tokenizer.turn(text, image=moved) if k % 2 else [*tokenizer.encode(text), tokenizer.eot]
        assert e.ids == wanted and len(e.pictures) == len(p.route.rail) == 1 + outcomes.count("right_action")


# ---- the SFT loss

def demonstrations(tokenizer, n=6):
    rng = random.Random(0)
    kinds = ["careful", "retry", "careless"] * n
    return [E.Episode.demonstrated(problem(i, 2), tokenizer, problem(i).demonstrate(kinds[i], rng)[::2]) for i in range(n)]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_demonstration_trains_responses_and_their_stop_tokens(tokenizer):
    p = problem(attempts=2)
    e = E.Episode.demonstrated(p, tokenizer, ["a wrong one", p.expert()])
    trained = [i for i, m in zip(e.ids, e.response_mask) if m]
    assert trained == tokenizer.encode("a wrong one") + [tokenizer.eot] + tokenizer.encode(p.expert()) + [tokenizer.eot]
    given = [i for i, m in zip(e.ids, e.response_mask) if not m]
    assert given == tokenizer.prompt(p.prompt) + tokenizer.turn(problem().step("a wrong one").feedback)


def test_sft_loss_by_hand_and_in_any_micro_batch(model, tokenizer):
    episodes = demonstrations(tokenizer)
    by_hand, count = 0.0, 0
    for e in episodes:
        log_p = model.logits(model(torch.tensor([e.ids])))[0].log_softmax(-1)
        for t, m in enumerate(e.response_mask):
            if m:
                by_hand, count = by_hand - log_p[t - 1, e.ids[t]].item(), count + 1
    results = []
    for size in (1, 2, 4, 6):
        model.zero_grad()
        before = [list(e.ids) for e in episodes]
        metrics = SFT.sft_backward(model, episodes, tokenizer.pad, size)
        assert metrics["loss"] == pytest.approx(by_hand / count, rel=1e-5) and metrics["tokens"] == count
        assert before == [e.ids for e in episodes]
        results.append(gradients(model))
    for other in results[1:]:
        for name, grad in results[0].items():
            assert torch.allclose(grad, other[name], atol=1e-5, rtol=1e-3), name


def test_what_follows_the_last_trained_token_does_not_matter(model, tokenizer):
    e = demonstrations(tokenizer)[0]
    ids, chosen, _ = E.to_batch([e], tokenizer.pad, "cpu")
    longer = torch.cat([ids, torch.full((1, 3), 5)], 1)
    wide = torch.cat([chosen, torch.zeros(1, 3, dtype=torch.bool)], 1)
    assert torch.allclose(model.log_probs(ids, chosen), model.log_probs(longer, wide), atol=1e-5)


def test_tokens_that_were_given_are_not_learned(model, tokenizer, monkeypatch):
    """The gradient at the logits is exactly 0 wherever the next token was given, and is not where it was sampled."""
    e, kept, real = demonstrations(tokenizer)[1], [], M.LlamaVision.logits
    assert len(e.turns) == 1 and 0 in e.response_mask[e.response_mask.index(1):]  # a retry: the verifier speaks in between

    def logits(self, hidden):
        kept.append(hidden)
        hidden.retain_grad()
        return real(self, hidden)
    monkeypatch.setattr(M.LlamaVision, "logits", logits)
    SFT.sft_backward(model, [e], tokenizer.pad, 1)
    assert sum(len(h.view(-1, h.shape[-1])) for h in kept) == sum(e.response_mask)  # the others have no logits at all
    assert all((h.grad.abs().sum(-1) > 0).all() for h in kept)


# ---- advantages and the policy loss

RETURNS = torch.tensor([[5.0, -2.0, -2.0, -1.0], [5.0, 5.0, 5.0, 5.0]])


@pytest.mark.parametrize("name, expected", [
    ("reinforce", [[2.5, -4.5, -4.5, -3.5], [2.5, 2.5, 2.5, 2.5]]),
    ("rloo", [[20 / 3, -8 / 3, -8 / 3, -4 / 3], [0.0] * 4]),
    ("dr_grpo", [[5.0, -2.0, -2.0, -1.0], [0.0] * 4]),
    ("grpo", [[5 / math.sqrt(8.5), -2 / math.sqrt(8.5), -2 / math.sqrt(8.5), -1 / math.sqrt(8.5)], [0.0] * 4]),
])
def test_advantages_by_hand(name, expected):
    before = RETURNS.clone()
    assert torch.allclose(RL.advantages(RETURNS, name), torch.tensor(expected), atol=1e-3)
    assert torch.equal(RETURNS, before)


def test_rloo_is_the_mean_of_the_others():
    r = torch.randn(3, 5)
    others = (r.sum(1, keepdim=True) - r) / 4
    assert torch.allclose(RL.advantages(r, "rloo"), r - others, atol=1e-6)


def test_equal_returns_give_exactly_zero_and_sparse_ones_stay_finite():
    equal = torch.full((2, 7), 0.1) * 3
    for name in ("rloo", "grpo", "dr_grpo"):
        assert (RL.advantages(equal, name) == 0).all()
    sparse = torch.zeros(1, 1000)
    sparse[0, 0] = 1
    for name in RL.ESTIMATORS:
        assert RL.advantages(sparse, name).isfinite().all()
    with pytest.raises(ValueError, match="--estimator"):
        RL.advantages(equal, "magic")


def test_policy_loss_and_clipping_by_hand():
    log_p, old = torch.tensor([0.0, 0.5, -0.5, 0.5]).requires_grad_(), torch.zeros(4)
    adv, weight = torch.tensor([1.0, 2.0, 2.0, -1.0]), torch.full((4,), 0.25)
    loss, _ = RL.policy_loss(log_p, old, adv, weight)
    r = [1.0, math.exp(0.5), math.exp(-0.5), math.exp(0.5)]
    assert loss.item() == pytest.approx(-0.25 * (r[0] + 2 * r[1] + 2 * r[2] - r[3]), rel=1e-6)
    loss, count = RL.policy_loss(log_p, old, adv, weight, clip_eps=0.2)
    assert loss.item() == pytest.approx(-0.25 * (1 + 2 * 1.2 + 2 * r[2] - r[3]), rel=1e-6)
    assert count.item() == 1
    loss.backward()
    assert log_p.grad[1] == 0 and (log_p.grad[[0, 2, 3]] != 0).all()


def test_the_upper_end_of_the_clipping_may_be_another_one():
    """Ratios 1.25, 1.3, 0.75: clipped at 1.2 or 1.28 above, at 0.8 below."""
    log_p, ones = torch.tensor([[1.25, 1.3, 0.75]]).log().requires_grad_(), torch.ones(1, 3)
    for high, sign, total, moving in ((0.0, 1, 1.2 + 1.2 + 0.75, [0, 0, 1]), (0.28, 1, 1.25 + 1.28 + 0.75, [1, 0, 1]),
                                      (0.28, -1, -1.25 - 1.3 - 0.8, [1, 1, 0])):
        loss, count = RL.policy_loss(log_p, 0 * ones, torch.tensor([[float(sign)]]), ones, 0.2, high)
        assert loss.item() == pytest.approx(-total, rel=1e-6) and count.item() == 3 - sum(moving)
        grad, = torch.autograd.grad(loss, log_p)
        assert grad.ne(0).int().tolist() == [moving]


def test_the_ratio_of_a_sequence_by_hand():
    """Two episodes of three and one tokens: log ratios 0.1, 0.6, -0.1 have the mean 0.2, so each of the three has exp(0.2)."""
    log_p = torch.tensor([[0.0, -0.9, -0.4, -1.1], [-0.5, 0.0, 0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[0.0, -1.0, -1.0, -1.0], [-1.0, 0.0, 0.0, 0.0]])
    chosen = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]]).bool()
    weight, advantage = RL.token_weights(chosen, "grpo", 2, 4), torch.tensor([[2.0], [-3.0]])
    both = [math.exp(0.2), math.exp(0.5)]
    loss, count = RL.policy_loss(log_p, old, advantage, weight, level="sequence")
    assert loss.item() == pytest.approx(-(2 * both[0] - 3 * both[1]) / 2, rel=1e-6) and count == 0  # GSPO's mean over episodes
    grad, = torch.autograd.grad(loss, log_p)
    assert grad[chosen].tolist() == pytest.approx([-2 * both[0] / 3 / 2] * 3 + [3 * both[1] / 2], rel=1e-6)
    loss, count = RL.policy_loss(log_p, old, advantage, weight, 0.1, 0.15, "sequence")
    assert loss.item() == pytest.approx(-(2 * 1.15 - 3 * both[1]) / 2, rel=1e-6) and count == 3  # all tokens of the first
    assert torch.autograd.grad(loss, log_p)[0][0].eq(0).all()
    token, _ = RL.policy_loss(log_p, old, advantage, weight)
    assert token.item() == pytest.approx(-(2 * (math.exp(0.1) + math.exp(0.6) + math.exp(-0.1)) / 3 - 3 * both[1]) / 2, rel=1e-6)


@pytest.mark.parametrize("cap", [0.0, 2.0, 1.2])
def test_the_ratio_corrects_for_a_rollout_of_other_probabilities_up_to_a_cap(cap):
    """Enumerated: answers of q, as a rollout in bfloat16, give the exact policy gradient of p; with a cap, TIS's."""
    q, reward = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([1.0, -2.0, 4.0])
    logits = torch.tensor([0.5, 0.1, -0.3], requires_grad=True)
    p = logits.softmax(0)
    exact, = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)
    ratio = (p / q).detach()
    assert ratio[2] > 2 and 1.2 > ratio[1] > 1 > ratio[0]
    truncated = (q * ratio.clamp(max=cap or math.inf) * reward * p.log()).sum()  # sum of q * min(p / q, C) * R * log p
    wanted, = torch.autograd.grad(truncated, logits, retain_graph=True)
    loss, _ = RL.policy_loss(p.log()[:, None], q.log()[:, None], reward[:, None], q[:, None], cap=cap)
    found, = torch.autograd.grad(loss, logits)
    assert torch.allclose(found, -wanted, atol=1e-6) and torch.allclose(found, -exact, atol=1e-6) == (not cap)


def test_gradient_is_the_policy_gradient_on_a_two_token_policy():
    """Enumerate a policy of two answers: the expected gradient of the loss is minus the gradient of expected reward."""
    logit = torch.tensor(0.3, requires_grad=True)
    reward = [1.0, -2.0]
    p = torch.sigmoid(logit)
    (p * reward[0] + (1 - p) * reward[1]).backward()
    exact, logit.grad = logit.grad.clone(), None
    with torch.no_grad():
        chance = [torch.sigmoid(logit).item(), 1 - torch.sigmoid(logit).item()]
    expected = 0.0
    for a in range(2):
        for b in range(2):  # a group of two independent answers
            log_p = torch.stack([torch.nn.functional.logsigmoid(logit if x == 0 else -logit) for x in (a, b)])
            adv = RL.advantages(torch.tensor([[reward[a], reward[b]]]), "rloo")[0]
            loss, _ = RL.policy_loss(log_p, log_p.detach(), adv, torch.tensor([0.5, 0.5]))
            expected += chance[a] * chance[b] * torch.autograd.grad(loss, logit)[0]
    assert expected.item() == pytest.approx(-exact.item(), rel=1e-5)


def test_kl_estimate():
    p, q = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    exact = (p * (p / q).log()).sum()
    estimate = (p * RL.kl_to_reference(p.log(), q.log())).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (RL.kl_to_reference(p.log(), q.log()) >= 0).all() and (RL.kl_to_reference(p.log(), p.log()) == 0).all()
    logits = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
    log_p, log_q = logits.log_softmax(-1), torch.tensor([0.2, 0.2, 0.6]).log()
    exact, = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)
    expected, = torch.autograd.grad((log_p.exp().detach() * RL.kl_to_reference(log_p, log_q)).sum(), logits)
    assert torch.allclose(expected, exact, atol=1e-6)  # as a loss it pulls like KL(policy || reference), not the reverse


def rl_args(**changes):
    argv = "--task gp-l --problems 4 --group 3 --attempts 3 --max-new-tokens 6 --temperature 0.8".split()
    args = RL.parse_args([*argv, "--init", str(rl_args.run)])
    vars(args).update(changes)
    return args


def loss_settings(**changes):
    """LossSettings of the random rollouts of this file."""
    return RL.LossSettings(**{"estimator": "dr_grpo", "temperature": 0.8, "clip_eps": 0.0, "kl_coef": 0.0, "micro_batch": 256} | changes)


@pytest.mark.parametrize("estimator", RL.ESTIMATORS)
def test_rl_update_is_the_same_in_any_micro_batch(model, tokenizer, estimator):
    groups = random_rollout(model, tokenizer)
    returns = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    advantage, results = RL.advantages(returns, estimator), []
    start = copy.deepcopy(model)
    with torch.no_grad():
        for p in start.parameters():
            p.add_(0.01)
    reference = lambda part, ids, chosen, image, temperature: start.log_probs(ids, chosen, 0.8).detach()
    for size in (1, 2, 12):
        model.zero_grad()
        settings = loss_settings(estimator=estimator, micro_batch=size, kl_coef=0.1)
        metrics = RL.rl_backward(model, groups, advantage, settings, tokenizer.pad, reference)
        assert metrics["ratio_error"] < 1e-4 and metrics["kl"] > 0
        results.append((metrics, gradients(model)))
    for metrics, grads in results[1:]:
        for key in ("loss", "kl"):
            assert metrics[key] == pytest.approx(results[0][0][key], rel=1e-4, abs=1e-6)
        for name, grad in results[0][1].items():
            assert torch.allclose(grad, grads[name], atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("changes", [{"ratio": "sequence"}, {"ratio": "sequence", "clip_eps": 0.02, "clip_eps_high": 0.05},
                                     {"ratio_cap": 1.05}, {"clip_eps": 0.1, "clip_eps_high": 0.3}])
def test_a_loss_off_policy_is_the_same_in_any_micro_batch(model, tokenizer, changes):
    """Against a sum over episodes, one at a time, of what the variant means."""
    groups, advantage = random_rollout(model, tokenizer), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    rng, wanted, clipped = random.Random(0), 0.0, []
    for e, value in zip(sum(groups, []), advantage.flatten().tolist()):
        shift = [rng.uniform(-0.4, 0.4) * mask for mask in e.response_mask]
        e.log_probs = [log_p - by for log_p, by in zip(e.log_probs, shift)]
        logs = [by for by, mask in zip(shift, e.response_mask) if mask]
        if "ratio" in changes:
            logs = [sum(logs) / len(logs)] * len(logs)
        for r in map(math.exp, logs):
            r = min(r, changes.get("ratio_cap", r))
            ends = 1 - changes.get("clip_eps", 9), 1 + changes.get("clip_eps_high", 9)
            gain = min(r * value, min(max(r, ends[0]), ends[1]) * value)
            wanted -= gain / len(logs) / 12
            clipped.append(gain < r * value)
    assert any(clipped) == ("clip_eps" in changes)
    results = []
    for size in (1, 5, 12):
        model.zero_grad()
        metrics = RL.rl_backward(model, groups, advantage, loss_settings(estimator="grpo", micro_batch=size, **changes), tokenizer.pad)
        assert metrics["loss"] == pytest.approx(wanted, abs=1e-4)
        assert metrics["clip_fraction"] == pytest.approx(sum(clipped) / len(clipped))
        results.append(gradients(model))
    for grads in results[1:]:
        for name, grad in results[0].items():
            assert torch.allclose(grad, grads[name], atol=1e-5, rtol=1e-3), name


def test_answers_that_were_cut_off_can_be_left_out(tokenizer, tiny_run, tmp_path, uneven_rewards):
    """They keep their place in the group's mean and in the divisors; they have no advantage of their own."""
    def answer(*ids):
        e = E.Episode(problem())
        e.append_context([1])
        e.append_response([*ids], [-0.5] * len(ids))
        return e
    groups = [[answer(40, tokenizer.eot), answer(40, 41)], [answer(40, 41, 42), answer(tokenizer.eot)]]
    advantage = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert RL.without_truncated(advantage, groups, tokenizer).tolist() == [[1, 0], [0, -2]]
    assert advantage.tolist() == [[1, -1], [2, -2]]
    work = []
    for flags, moved in (("", True), ("--mask-truncated", False)):
        out = tmp_path / f"run{moved}"
        RL.main(f"--init {tiny_run} --out {out} --steps 1 --problems 2 --group 4 --max-new-tokens 3 --evals 0 --device cpu {flags}".split())
        record = lines(out)[0]
        assert record["truncated"] == 1 and record["signal"] > 0 and (record.get("grad_norm", 0) > 0) == moved
        work.append(record["flops"])
    assert work[0] > 2 * work[1]  # an update that is not computed is not charged


def shifted(model):
    """A reference of other weights, as Run.reference is called."""
    start = copy.deepcopy(model)
    with torch.no_grad():
        for p in start.parameters():
            p.add_(0.01)
    return lambda part, ids, chosen, images, temperature: start.log_probs(ids, chosen, temperature).detach()


@pytest.mark.parametrize("size", [1, 2, 12])
def test_the_kl_is_measured_on_all_episodes_and_changes_no_gradient(model, tokenizer, size):
    """One group of four has signal, and in it two of three episodes. The KL is the mean over every sampled token."""
    groups, reference, advantage = random_rollout(model, tokenizer), shifted(model), torch.zeros(4, 3)
    advantage[2] = torch.tensor([1.0, -1.0, 0.0])
    kl = []
    for episode in (e for group in groups for e in group):
        ids, chosen, old = E.to_batch([episode], tokenizer.pad, "cpu")
        with torch.no_grad():
            kl += RL.kl_to_reference(model.log_probs(ids, chosen, 0.8), reference(None, ids, chosen, None, 0.8)).tolist()
    results = []
    for measure in (None, reference):
        model.zero_grad()
        metrics = RL.rl_backward(model, groups, advantage, loss_settings(micro_batch=size), tokenizer.pad, measure)
        results.append((metrics, gradients(model)))
    (without, wanted), (metrics, found) = results
    assert metrics["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4) and "kl" not in without
    assert metrics["loss"] == without["loss"] and wanted.keys() == found.keys()
    assert all(torch.equal(grad, found[name]) for name, grad in wanted.items())


def test_the_kl_is_measured_without_any_signal_too(model, tokenizer):
    groups, reference, called = random_rollout(model, tokenizer), shifted(model), []
    model.zero_grad()
    noted = lambda *args: called.append(torch.is_grad_enabled()) or reference(*args)
    model.register_forward_hook(lambda *_: called.append(torch.is_grad_enabled()))
    metrics = RL.rl_backward(model, groups, torch.zeros(4, 3), loss_settings(), tokenizer.pad, noted)
    assert metrics["kl"] > 0 and metrics["loss"] == 0 and len(called) == 1
    assert SFT.update(model, torch.optim.SGD(model.parameters(), 1.0), 1.0, 1.0) == {}


def test_tokens_without_signal_count_among_those_that_could_be_clipped(model, tokenizer):
    groups, advantage = random_rollout(model, tokenizer), torch.zeros(4, 3)
    advantage[0] = 1.0
    for e in groups[0]:  # far less likely when they were sampled: all are beyond 1 + eps
        e.log_probs = [value - 5 * mask for value, mask in zip(e.log_probs, e.response_mask)]
    metrics = RL.rl_backward(model, groups, advantage, loss_settings(clip_eps=0.2), tokenizer.pad)
    tokens = [sum(e.response_tokens for e in group) for group in groups]
    assert metrics["clip_fraction"] == pytest.approx(tokens[0] / sum(tokens))


def test_metrics_of_several_epochs_are_their_means(tiny_run, tmp_path, monkeypatch):
    """Three epochs at a rate at which the policy moves: every metric of the updates, the KL included."""
    noted, real, moves = [], RL.rl_backward, RL.update
    monkeypatch.setattr(tasks.GeneralPoints, "step", lambda self, text: tasks.Step(float(len(text)), True, "", "illegal"))
    monkeypatch.setattr(RL, "rl_backward", lambda *args: noted.append(real(*args)) or dict(noted[-1]))
    monkeypatch.setattr(RL, "update", lambda *args: noted[-1].update(moves(*args)) or {k: noted[-1][k] for k in ("grad_norm", "learning_rate", "changed")})
    RL.main(f"--init {tiny_run} --out {tmp_path / 'run'} --steps 2 --problems 4 --group 3 --max-new-tokens 8 --evals 0 --epochs 3 "
            "--clip-eps 0.01 --kl-every 1 --lr 1e-3 --lr-warmup 0 --device cpu".split())
    for line, epochs in zip(lines(tmp_path / "run"), (noted[:3], noted[3:])):
        assert len({each["kl"] for each in epochs}) == 3 and epochs[2]["ratio_error"] > 10 * epochs[0]["ratio_error"]
        for name in ("loss", "kl", "clip_fraction", "ratio_error", "grad_norm", "learning_rate"):
            assert line[name] == pytest.approx(sum(each[name] for each in epochs) / 3, rel=1e-12), name
        assert "changed" not in line


def test_loss_by_hand_over_a_batch(model, tokenizer):
    """dr_grpo divides by the sampled tokens of the whole batch, grpo by each episode's own length."""
    groups = random_rollout(model, tokenizer)
    advantage = torch.arange(12.0).view(4, 3) % 3 - 1  # 0 for every second episode: it is not computed, but counted
    lengths = torch.tensor([[sum(e.response_mask) for e in group] for group in groups])
    model.zero_grad()
    loss = RL.rl_backward(model, groups, advantage, loss_settings(), tokenizer.pad)["loss"]
    assert loss == pytest.approx(-(advantage * lengths).sum().item() / lengths.sum().item(), abs=1e-4)
    loss = RL.rl_backward(model, groups, advantage, loss_settings(estimator="grpo"), tokenizer.pad)["loss"]
    assert loss == pytest.approx(-advantage.sum().item() / 12, abs=1e-4)


def test_no_signal_is_no_loss_and_no_update(model, tokenizer):
    groups, before = random_rollout(model, tokenizer), copy.deepcopy(model)
    model.zero_grad()
    assert RL.rl_backward(model, groups, torch.zeros(4, 3), loss_settings(), tokenizer.pad) == {}
    assert SFT.update(model, torch.optim.SGD(model.parameters(), 1.0), 1.0, 1.0) == {}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


@pytest.mark.parametrize("estimator", RL.ESTIMATORS)
def test_a_limit_that_no_answer_reaches_changes_nothing(tiny_run, tmp_path, monkeypatch, estimator):
    """The same answers with room for 8 and for 800 tokens: the same losses, gradients and weights, bit for bit."""
    def generate(model, cache, logits, sampling, stop_ids):
        answers = [[40] * (1 + i % 2) + [min(stop_ids)] for i in range(len(logits))]
        return answers, [[-1.0] * len(answer) for answer in answers]
    monkeypatch.setattr(E, "generate", generate)
    monkeypatch.setattr(tasks.GeneralPoints, "step", lambda self, text: tasks.Step(float(len(text)), True, "", "illegal"))
    weights = []
    for room in (8, 800):
        out = tmp_path / str(room)
        RL.main(f"--init {tiny_run} --out {out} --steps 2 --problems 2 --group 2 --max-new-tokens {room} --evals 0 --estimator "
                f"{estimator} --device cpu".split())
        weights.append(load_tensors(out / "step-000002" / M.WEIGHTS))
    record, other = (
        [{k: v for k, v in line.items() if "seconds" not in k and "speed" not in k and k != "step_time"} for line in lines(tmp_path / str(room))] for room in (8, 800))
    assert record == other and record[0]["grad_norm"] > 0
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("changes, forward_passes", [({}, 3), ({"kl_coef": 0.1}, 4), ({"epochs": 2}, 6), ({"kl_coef": 0.1, "epochs": 2}, 8)])
def test_rl_step_flops_by_counting_what_is_computed(model, tokenizer, changes, forward_passes, monkeypatch):
    """Every token is computed once in the rollout, the update costs whole passes; prompts count once per group. Of passes with
    adapters or recompute: test_flops.py."""
    groups, counted = random_rollout(model, tokenizer), []
    monkeypatch.setattr(RL, "pass_flops", lambda model, work, backward=False, adapters=True: counted.append(work) or (
        work.tokens * (3 if backward else 1)))
    rollout_tokens = sum(group[0].response_mask.index(1) for group in groups) + sum(
        len(e.ids) - 1 - e.response_mask.index(1) for group in groups for e in group)
    trained, advantage = groups[1], torch.zeros(4, 3)
    advantage[1] = torch.tensor([1.0, -2.0, 1.0])
    settings = loss_settings(kl_coef=changes.get("kl_coef", 0.0))
    if settings.kl_coef:  # then every episode is trained
        monkeypatch.setattr(RL, "with_signal", lambda groups, advantage, kl_coef: trained)
    flops, paper = RL.step_flops(model, groups, advantage, settings, changes.get("epochs", 1))
    prompt = trained[0].response_mask.index(1) - 1  # its last token begins every episode's own part
    assert flops == rollout_tokens + forward_passes * (prompt + sum(len(e.ids) - 1 - prompt for e in trained))
    assert sum(sum(e.response_mask) for g in groups for e in g) - 2 * len(groups) in [work.scored for work in counted]


# ---- the mixture, the schedule

def test_mixtures_are_read_and_bad_ones_are_sentences():
    assert SFT.read_mixture("rules", ["10", "11,12,13:2.5"]) == (["10", "11,12,13"], [1.0, 2.5])
    for rules, kinds, words in ((["10"], ["clever:1"], "clever"), (["10:x"], ["expert"], "number"), (["10:-1"], ["expert"], "positive"),
                                (["10:nan"], ["expert"], "positive"), (["ten"], ["expert"], "ten"), (["10"], ["expert:0"], "positive")):
        with pytest.raises(ValueError, match=words):
            SFT.parse_args(["--rules", *rules, "--demonstrators", *kinds])


def drawn(monkeypatch, tokenizer, args, count=2000):
    """(rule, demonstrator, look) of the first demonstrations."""
    model, found = SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(image_size=32))), []

    class Noted:
        def demonstrate(self, kind, rng):
            found[-1].insert(1, kind)
            return [""]
    monkeypatch.setattr(tasks, "make", lambda task, rule, visual, *more, **style: found.append([rule, visual]) or Noted())
    monkeypatch.setattr(E.Episode, "demonstrated", lambda *more: None)
    data = SFT.demonstrations(args, E.prompt_style(model, tokenizer))
    for index in range(count):
        data.episode(tokenizer, index)
    return found


def test_mixture_has_its_shares(monkeypatch, tokenizer):
    args = SFT.parse_args("--rules 10:1 11,12,13:3 --demonstrators expert:1 lazy:1".split())
    first = drawn(monkeypatch, tokenizer, args)
    assert abs(sum(rule == "10" for rule, _, _ in first) - 500) < 80 and abs(sum(kind == "lazy" for _, kind, _ in first) - 1000) < 100
    assert {look for _, _, look in first} == {None}
    args.visuals = ["black:1", "red/glyphs=*:3"]
    second = drawn(monkeypatch, tokenizer, args)
    looks = [look for _, _, look in second]
    assert set(looks) == {"black", "red/glyphs=*"} and abs(looks.count("black") - 500) < 80
    assert [each[:2] for each in second[:50]] == [each[:2] for each in first[:50]]


def run_with(flags):
    """A Run without a model: schedule and budget only."""
    return SFT.Run(SFT.parse_args(flags.split()), None, SimpleNamespace(device="cpu"), None, None)


def test_when_a_run_is_evaluated():
    for evals, steps in ((0, []), (1, [4]), (2, [0, 4]), (3, [0, 2, 4])):
        run, due = run_with(f"--steps 4 --evals {evals}"), []
        for step in range(5):
            if run.eval_due():
                due.append(step)
                run.progress.evals_done += 1
            run.progress.step += 1
        assert due == steps


def test_schedule_warms_up_and_falls():
    run, lrs = run_with("--steps 100 --lr 1e-3 --lr-warmup 10 --lr-end 0.1"), []
    for _ in range(100):
        lrs.append(run.lr())
        run.progress.step += 1
    assert lrs[:10] == pytest.approx([1e-4 * i for i in range(1, 11)]) and lrs[-1] == pytest.approx(1e-4, rel=0.02)
    assert lrs[9:] == sorted(lrs[9:], reverse=True) and not run.goes_on()
    middle = (9 + 100) / 2  # half of the cosine is behind the run there, counted from the end of the warm-up
    assert lrs[int(middle)] == pytest.approx((1e-3 + 1e-4) / 2, rel=0.02)


@pytest.mark.parametrize("flags, peak", [("--steps 20", 9), ("--steps 90", 9), ("--flops 20", 9), ("--steps 20 --lr-warmup 0", 0)])
def test_the_rate_that_was_asked_for_is_reached_once_the_warm_up_ends(flags, peak):
    run, lrs = run_with(f"--lr 1e-3 {flags}"), []
    while run.goes_on():
        lrs.append(run.lr())
        run.progress.step += 1
        run.progress.flops += 1
    assert lrs[peak] == 1e-3 == max(lrs) and lrs.count(1e-3) == 1 and lrs[-1] < 2e-4


def test_an_update_uses_its_rate_and_clips(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    run, total = run_with(""), math.sqrt(sum(p.numel() for p in model.parameters()))
    start, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=123.0)
    metrics = SFT.update(model, optimizer, 0.5, total / 4)
    assert metrics == {"grad_norm": pytest.approx(total, rel=1e-4), "learning_rate": 0.5, "changed": True}
    for p, q in zip(model.parameters(), start.parameters()):
        assert torch.allclose(p, q - 0.5 / 4, atol=1e-5) and p.grad is None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model)
    metrics = SFT.update(model, optimizer, 0.0, 1.0)
    run.notice_waste(metrics, metrics.pop("changed"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters())) and run.progress.idle["update"] == 1


def test_adamw16_is_adamw_where_nothing_is_rounded():
    torch.manual_seed(0)
    p = torch.randn(40, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    ours, theirs = SFT.AdamW16([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1), torch.optim.AdamW([q], 0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(20):
        p.grad = torch.randn(40)
        q.grad = p.grad.clone()
        ours.step(), theirs.step()
    assert torch.allclose(p, q, atol=1e-5)


def test_random_rounding_is_right_on_average_and_steps_below_the_spacing_add_up():
    torch.manual_seed(0)
    value = torch.tensor([1 + 1 / 512, -3.14159, 1e-8, 0.0]).repeat(20000, 1)
    target = torch.empty_like(value, dtype=torch.bfloat16)
    SFT.round_at_random(target, value)
    assert torch.allclose(target.float().mean(0), value[0], rtol=3e-4) and (target[:, 3] == 0).all()
    assert ((target.float() - value).abs() <= value.abs() / 128).all()
    p = torch.ones(5000, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SFT.AdamW16([p], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(0.99, abs=5e-4)  # rounded to nearest it would stay at 1
    assert {v.dtype for k, v in optimizer.state[p].items() if k != "step"} == {torch.bfloat16}


def test_budget_in_flops_ends_a_run():
    run, due = run_with("--flops 95 --evals 3"), 0
    while run.goes_on():
        due += run.eval_due()
        run.progress.evals_done = due
        run.progress.step, run.progress.flops = run.step + 1, run.progress.flops + 10
    due += run.eval_due()
    assert run.step == 10 and due == 3


# ---- evaluation and the choice of rates

def test_evaluation_reports_what_was_said_where_it_was_said(tokenizer, model, monkeypatch):
    """A stand-in model: greedy it answers by the trained rule, sampled by the prompt's, right at the second attempt."""
    seen = []

    def rollout(model, tokenizer, problems, group, sampling, forced=False):
        groups, temperature = [], sampling.temperature
        for i, p in enumerate(problems):
            seen.append((str(p.rule), temperature))
            episode, p = E.Episode(p), copy.copy(p)
            like = tasks.make("gp-l", "10" if temperature == 0 else p.rule, split="val", index=i, style="short")
            assert like.hand == p.hand
            right = like.expert()
            for text in ("no", right):
                episode.append_response(tokenizer.encode(text) + [tokenizer.eot])
                episode.problem = p
                if episode.verify(tokenizer, text):
                    break
            groups.append([episode])
        return groups
    monkeypatch.setattr(E, "rollout", rollout)
    result = E.evaluate(model, tokenizer, E.EvalSettings("gp-l", 5, attempts=2, split="val"))
    share = E.summary(result)
    assert sorted(set(seen)) == [("10", 0.0), ("10", 1.0), ("11,12,13", 0.0), ("11,12,13", 1.0)]
    assert all(share[f"{row}/{mode}/first"] == 0 for row in E.ROWS for mode in E.MODES)
    assert [share[f"{row}/greedy/episode"] for row in E.ROWS] == [1, 0, 1]
    assert [share[f"{row}/sampled/episode"] for row in E.ROWS] == [1, 1, 0]


def test_pass_at_k_samples_k_answers_at_temperature_1(tokenizer, model, monkeypatch):
    def rollout(model, tokenizer, problems, group, sampling, forced=False):
        assert (group, sampling.temperature, sampling.batch) == (4, 1.0, 9) and len(problems) <= 2  # 9 rows hold two groups of 4
        groups = [[E.Episode(copy.copy(p)) for _ in range(group)] for p in problems]
        for members in groups:
            for j, e in enumerate(members):
                e.turns = [{"outcome": "correct" if j < played[0] else "illegal"}]  # 0, 1 and 2 of 4 are right
            played[0] += 1
        return groups
    played = [0]
    monkeypatch.setattr(E, "rollout", rollout)
    curve = E.pass_at_1_to_k(model, tokenizer, E.EvalSettings("gp-l", 3, split="val", max_new_tokens=5, batch=9), 4)["id"]
    assert curve == pytest.approx([(0 + 1 / 4 + 1 / 2) / 3, (0 + 1 / 2 + 5 / 6) / 3, (0 + 3 / 4 + 1) / 3, 2 / 3])


def test_every_probe_has_intervals_over_its_own_classes(tokenizer, model):
    result = E.evaluate(model, tokenizer, E.EvalSettings("gp-l-probes", 6, max_new_tokens=2))
    for row in tasks.suite_rows("gp-l-probes"):
        assert result["row_classes"][row.name] == [tasks.make("gp-l", row.rule, split="test", index=i).cls for i in range(6)]
    assert len({tuple(classes) for classes in result["row_classes"].values()}) > 1


def grid_run(path, right, other=0, n=100):
    """The last evaluation of a run of a grid: so many of n hands right under ID, and under the other rules."""
    hits = {row: [1] * share + [0] * (n - share) for row, share in zip(E.ROWS, (right, other, other))}
    M.write_json(path / "evals" / "000009.json", {
        "suite": "gp-l", "split": "val", "attempts": 1, "step": 9, "flops": 1.0, "classes": [*map(str, range(n))], "samples": [],
        "rows": {row: {mode: {part: hits[row] for part in tasks.GeneralPoints.SCORES} for mode in E.MODES} for row in E.ROWS}})


@pytest.mark.parametrize("scores, smallest, best, wanted", [
    ({1e-4: 40, 3e-4: 50, 1e-3: 51}, 3e-4, 1e-3, [3e-3]),
    ({1e-4: 20, 3e-4: 30, 1e-3: 60}, 1e-3, 1e-3, [3e-3]),
    ({1e-4: 60, 3e-4: 60, 1e-3: 10}, 1e-4, 1e-4, [3e-5]),
    ({1e-4: 57, 3e-4: 60, 1e-3: 10}, 3e-4, 3e-4, []),      # 3 points worse on the same hands: standard error 1.7, not 4.9
    ({1e-4: 59, 3e-4: 60, 1e-3: 10}, 1e-4, 3e-4, [3e-5]),  # the smallest choice is an edge
    ({2e-4: 50}, 2e-4, 2e-4, [1e-4, 3e-4]), ({1e-7: 60, 1e-3: 1}, 1e-7, 1e-7, []), ({.01: 5, .1: 60}, .1, .1, [])])
def test_rates_are_chosen_by_id_alone_within_the_error_of_the_paired_difference(scores, smallest, best, wanted, tmp_path, capsys):
    for rate, right in scores.items():
        for arm in ("sft", "rl"):
            (tmp_path / f"{arm}-lr{rate:g}/evals").mkdir(parents=True)
            grid_run(tmp_path / f"{arm}-lr{rate:g}", right, other=100 * (rate not in (smallest, best)))  # OOD would choose another
    assert studies.choose_rates(tmp_path) == {arm: (smallest, best) for arm in ("rl", "sft")}
    out = capsys.readouterr().out
    assert "best |" in out and "smallest" in out and "OOD" not in out and "100.0" not in out
    assert (tmp_path / "chosen").read_text() == "".join(f"RL_LR={rate:g} SFT_LR={rate:g}\n" for rate in (smallest, best))
    assert (tmp_path / "next").read_text() == "".join(f"{arm} {rate:g}\n" for arm in ("rl", "sft") for rate in wanted)


# ---- the scripts, end to end

@pytest.fixture
def uneven_rewards(monkeypatch):
    """An untrained model never solves anything, so no group would have signal: reward by the length of the text instead."""
    real = tasks.GeneralPoints.step
    monkeypatch.setattr(tasks.GeneralPoints, "step", lambda self, text: real(self, text)._replace(reward=float(len(text) % 5)))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_sft_run_directory(tiny_run):
    names = {p.name for p in tiny_run.iterdir()}
    assert {"args.json", "metrics.jsonl", "evals", "latest", "source", "step-000002"} <= names
    assert {p.name for p in (tiny_run / "source").iterdir()} == {f"{n}.py" for n in ("model", "tasks", "evaluate", "train_sft", "train_rl")} | {"assets"}
    assert [r["step"] for r in lines(tiny_run)] == [1, 2] and lines(tiny_run)[1]["flops"] > 0
    state = torch.load(tiny_run / "step-000002" / "state.pt", weights_only=True)
    assert state["step"] == 2
    result = json.loads((tiny_run / "evals" / "000002.json").read_text())
    assert result["n"] == 4 and len(result["rows"]["id"]["greedy"]["first"]) == 4 and set(result["rows"]) == {"id", "rule", "fake"}


@pytest.mark.parametrize("script, extra", [
    (SFT, "--batch 8 --steps 6 --eval-rows id rule fake --train decoder"),
    (SFT, "--batch 8 --steps 6 --lora-rank 2 --recompute"),
    (make_base, "--batch 8 --steps 6 --optimizer muon"),
    (SFT, "--batch 8 --steps 6 --optimizer adamw16"),
    (RL, "--problems 2 --group 3 --attempts 2 --max-new-tokens 6 --steps 6 --estimator reinforce --kl-coef 0.1"),
    (RL, "--problems 2 --group 3 --max-new-tokens 6 --steps 6 --estimator reinforce --lora-rank 2 --epochs 2 --clip-eps 0.2"),
])
def test_resumed_equals_uninterrupted(script, extra, tiny_run, tmp_path, uneven_rewards):
    """6 steps = 3 steps, stop, resume: weights, optimizer, random states and metrics, bit for bit."""
    common = f"{extra} --init {tiny_run} --eval-n 4 --evals 2 --save-every 3 --device cpu --seed 5"
    script.main(f"{common} --out {tmp_path / 'whole'}".split())
    stop_after(script, 3, lambda: script.main(f"{common} --out {tmp_path / 'parts'}".split()))
    assert (tmp_path / "parts" / "latest").read_text() == "step-000003\n"
    script.main(["--resume", str(tmp_path / "parts")])
    a, b = (torch.load(tmp_path / n / "step-000006" / "state.pt", weights_only=True) for n in ("whole", "parts"))
    assert torch.equal(a["random"]["torch"], b["random"]["torch"]) and torch.equal(a["random"]["sampling"], b["random"]["sampling"])
    parts = lambda state: state["optimizer"].get("parts", [state["optimizer"]])
    for one, other in zip(parts(a), parts(b)):
        assert one["state"] and one["param_groups"] == other["param_groups"]
        for key, moments in one["state"].items():
            assert all(torch.equal(v, other["state"][key][k]) for k, v in moments.items())
    weights = M.ADAPTER if "lora" in extra else M.WEIGHTS
    a, b = (load_tensors(tmp_path / n / "step-000006" / weights) for n in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    timeless = lambda run: [{k: v for k, v in r.items() if "seconds" not in k and "speed" not in k and k != "step_time"} for r in lines(run)]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    start = load_tensors(E.find_model(str(tiny_run), "gp-l") / M.WEIGHTS)
    if "lora" not in extra:
        assert any(not torch.equal(a[k], start[k]) for k in a)


def test_a_run_of_an_earlier_version_goes_on(tiny_run, tmp_path, uneven_rewards):
    """Its args.json lacks the flags that came later: it goes on as it would have, bit for bit."""
    flags = f"--init {tiny_run} --steps 4 --problems 2 --group 3 --max-new-tokens 6 --evals 0 --save-every 2 --device cpu"
    RL.main(f"{flags} --out {tmp_path / 'whole'}".split())
    for again in (["--resume", str(tmp_path / "a")], f"{flags} --out {tmp_path / 'b'} --or-resume".split()):
        run = tmp_path / ("b" if "--out" in again else "a")
        stop_after(RL, 2, lambda: RL.main(f"{flags} --out {run}".split()))
        stored = json.loads((run / "args.json").read_text())
        for name in ("clip_eps_high", "ratio", "ratio_cap", "mask_truncated"):
            del stored[name]
        M.write_json(run / "args.json", stored)
        if "--or-resume" in again:
            with pytest.raises(ValueError, match="other settings .--ratio-cap 0.0, not 2.0"):
                RL.main([*again, "--ratio-cap", "2"])
        RL.main(again)
        a, b = (load_tensors(tmp_path / n / "step-000004" / M.WEIGHTS) for n in ("whole", run.name))
        assert all(torch.equal(a[k], b[k]) for k in a)
    M.write_json(run / "args.json", {name: value for name, value in stored.items() if name != "clip_eps"})
    with pytest.raises(ValueError, match="was not written by"):  # a flag that every version had
        RL.main(["--resume", str(run)])


@pytest.mark.parametrize("flags, words", [("--clip-eps 0.2", "do nothing"), ("--ratio sequence", "do nothing"), ("--clip-eps-high 0.28", "--clip-eps-high is the upper"),
                                          ("--ratio word", "--ratio"), ("--ratio-cap -1", "--ratio-cap"), ("--clip-eps-high nan", "--clip-eps-high")])
def test_flags_of_the_loss_that_would_do_nothing_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        RL.parse_args(flags.split())
    RL.parse_args("--epochs 2 --clip-eps 0.2 --clip-eps-high 0.28 --ratio sequence --ratio-cap 2 --mask-truncated".split())


def stop_after(script, steps, run):
    """Run a script whose Run asks it to stop after so many steps, as Ctrl-C does."""
    original = SFT.Run.finish_step

    def finish_step(self, *step):
        original(self, *step)
        self.stopping = self.step >= steps
    SFT.Run.finish_step = finish_step
    try:
        run()
    finally:
        SFT.Run.finish_step = original


def test_training_sees_training_problems_only(tiny_run, tmp_path, monkeypatch, uneven_rewards):
    """Both trainers: what is trained comes from split train, what is evaluated from --eval-split."""
    real, seen = tasks.make, []
    monkeypatch.setattr(tasks, "make", lambda *a, **k: seen.append(k.get("split") or (a[3] if len(a) > 3 else "train")) or real(*a, **k))
    common = f"--init {tiny_run} --steps 2 --eval-n 3 --evals 1"
    for script, flags, wanted in ((SFT, "--batch 4 --eval-split test", ["train"] * 11 + ["test"] * 15),  # 6 of them for the teacher
                                  (RL, "--problems 3 --group 2 --max-new-tokens 4", ["train"] * 8 + ["val"] * 9)):
        seen.clear()
        script.main(f"{common} {flags} --out {tmp_path / script.__name__}".split())
        assert sorted(seen) == sorted(wanted)  # the first two or three of train check --rule, --rules and --visual


@pytest.mark.parametrize("estimator", RL.ESTIMATORS)
def test_rl_raises_what_is_rewarded(estimator, tiny_run, tmp_path, monkeypatch):
    """Reward tokens of even length and nothing else: after some steps most answers are such."""
    monkeypatch.setattr(tasks.GeneralPoints, "step", lambda self, text: tasks.Step(float(len(text) % 2 == 0), True, "", "illegal"))
    RL.main(f"--init {tiny_run} --out {tmp_path / 'run'} --steps 25 --problems 4 --group 8 --max-new-tokens 1 --evals 0 --lr 3e-3 "
            f"--lr-warmup 0 --estimator {estimator}".split())
    rewards = [record["reward"] for record in lines(tmp_path / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.2, rewards


def test_the_reference_is_the_start(tiny_run, tokenizer, model):
    """LoRA: the adapters off; full fine-tuning: the start's weights. Both stay where they were while the policy moves."""
    rl_args.run = tiny_run
    ids = torch.randint(0, 300, (2, 9))
    chosen = torch.ones_like(ids, dtype=torch.bool)
    start = model.log_probs(ids, chosen, 0.8).detach()
    M.add_lora(model, 2, 4.0)
    reference = partial(SFT.make_reference(model, rl_args(lora_rank=2)), temperature=0.8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    assert torch.allclose(reference([], ids, chosen), start, atol=1e-5)
    assert not torch.allclose(model.log_probs(ids, chosen, 0.8), start, atol=1e-2)
    loaded, _ = M.load_model(E.find_model(str(tiny_run), "gp-l"))
    reference = partial(SFT.make_reference(loaded, rl_args()), temperature=0.8)
    before = reference([], ids, chosen)
    with torch.no_grad():
        loaded.language_model.lm_head.weight.mul_(1.5)
    assert torch.equal(reference([], ids, chosen), before)


@pytest.mark.parametrize("lora", [0, 2])
def test_how_far_a_run_has_moved_is_measured_on_its_own_answers(tiny_run, tmp_path, lora):
    """An evaluation has 0 nats at the start; later the sum of log p - log p of the start over each sampled answer, which the
    model of another process gives too. The teacher's answers are scored as they are in the loss."""
    SFT.main(f"--init {tiny_run} --out {tmp_path / 'a'} --steps 4 --batch 8 --lr 3e-3 --lr-warmup 0 --eval-n 6 --eval-moved --lora-rank {lora} "
             "--demonstrators sorted --device cpu".split())
    first, last = (json.loads(path.read_text())["nats"] for path in sorted((tmp_path / "a" / "evals").glob("*.json")))
    assert all(abs(value) < 1e-4 for row in ("id", "rule") for value in first["moved"][row])
    start, tokenizer = M.load_model(E.find_model(str(tiny_run), "gp-l"))
    model, _ = M.load_model(E.find_model(str(tmp_path / "a"), "gp-l"))
    settings = E.EvalSettings("gp-l", 6, 1, "val", teacher="sorted")
    for row in tasks.suite_rows("gp-l")[:2]:
        episodes = E.play(model, tokenizer, E.suite_problems(model, tokenizer, settings, row), settings, "sampled")
        for episode, moved in zip(episodes, last["moved"][row.name]):
            ids, chosen = torch.tensor([episode.ids]), torch.tensor([episode.response_mask]).bool()
            alone = (model.log_probs(ids, chosen) - start.log_probs(ids, chosen)).sum().item()
            assert moved == pytest.approx(alone, abs=2e-3)
        for which, nats in ((start, first["teacher"]), (model, last["teacher"])):
            problems = E.suite_problems(which, tokenizer, settings, row)
            for problem, value in zip(problems, nats[row.name]):
                episode = E.Episode.demonstrated(problem, tokenizer, problem.demonstrate("sorted", random.Random(0)))
                loss = SFT.sft_backward(which, [episode], tokenizer.pad, 8)
                assert value == pytest.approx(loss["loss"] * loss["tokens"], abs=2e-3)
    assert max(abs(value) for value in last["moved"]["id"]) > 0.01


def test_an_adapter_given_as_the_start_is_merged_into_it(tiny_run, tmp_path, uneven_rewards):
    """LoRA, then full, LoRA of another rank, and a resume of each: the start is base plus adapter, and KL begins at 0."""
    common = "--evals 0 --device cpu"
    SFT.main(f"--init {tiny_run} --out {tmp_path / 'a'} --lora-rank 3 --steps 2 --batch 4 --lr 1e-2 {common}".split())
    start, _ = M.load_model(E.find_model(str(tmp_path / "a"), "gp-l"))
    for rank in (0, 2):
        out = tmp_path / f"r{rank}"
        RL.main(f"--init {tmp_path / 'a'} --out {out} --lora-rank {rank} --steps 2 --save-every 1 --problems 2 --group 3 --max-new-tokens 4 "
                f"--kl-every 1 --estimator reinforce --lr 1e-2 {common}".split())
        first, second = lines(out)
        assert first["kl"] < 1e-9 < second["kl"]
        adapter = out / "step-000002" / M.ADAPTER_CONFIG
        assert (json.loads(adapter.read_text())["r"] == rank) if rank else not adapter.exists()
        wanted = M.load_model(E.find_model(str(out), "gp-l"))[0]
        shutil.rmtree(out / "step-000002")
        RL.main(["--resume", str(out)])
        again = M.load_model(E.find_model(str(out), "gp-l"))[0]
        ids = torch.arange(20)[None]
        assert torch.equal(wanted.logits(wanted(ids)), again.logits(again(ids)))
        assert not torch.allclose(start.logits(start(ids)), again.logits(again(ids)), atol=1e-3)


def test_the_shipped_base_reads_pictures_and_not_those_of_other_hands():
    model, tokenizer = M.load_model(E.find_model("tiny", "gp-vl"))
    result = E.evaluate(model, tokenizer, E.EvalSettings("gp-vl", 24, split="val", rows=("id", "red", "words", "shuffled", "text")))
    read = {row: sum(share == 1 for share in modes["greedy"]["read"]) for row, modes in result["rows"].items()}
    assert min(read["id"], read["red"], read["words"], read["text"]) >= 22 and read["shuffled"] <= 2, read
    assert {s["row"] for s in result["samples"] if "picture" in s} == {"id", "red", "words", "shuffled"}


def test_a_question_about_a_picture(tiny_run, tmp_path, capsys):
    Image.new("RGB", (50, 20), "red").save(tmp_path / "red.png")
    E.main([str(tiny_run), "--ask", "What is it?", "--image", str(tmp_path / "red.png"), "--max-new-tokens", "4"])
    E.main([str(tiny_run), "--ask", "What is it?", "--max-new-tokens", "4"])
    assert "success" not in capsys.readouterr().out
    for flags, words in ((["--ask", "?", "--image", str(tmp_path / "no.png")], "no.png"), (["--image", "x.png"], "--ask")):
        with pytest.raises(ValueError, match=words):
            E.main([str(tiny_run), *flags])


def test_the_kl_pulls_back_to_the_reference(model, tokenizer):
    """With no advantage at all, a step against the gradient brings the policy nearer to where the reference is."""
    start = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    groups, settings = random_rollout(model, tokenizer, group=8), loss_settings(kl_coef=1.0, estimator="grpo")
    reference = lambda part, ids, chosen, image, temperature: start.log_probs(ids, chosen, 0.8).detach()
    distance = lambda: RL.rl_backward(model, groups, torch.zeros(4, 8), settings, tokenizer.pad, reference)["kl"]
    before = distance()
    with torch.no_grad():
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
        for p in (p for p in model.parameters() if p.grad is not None):
            p.sub_(p.grad, alpha=0.02 / norm)
    assert 0 < distance() < before


def test_returns_are_discounted_and_repeats_are_counted(tiny_run, tmp_path, monkeypatch, tokenizer):
    def step(self, text):
        self.attempt += 1
        return tasks.Step(5.0 if self.attempt == 2 else -3.0, self.attempt == 2, "No.", "illegal")
    monkeypatch.setattr(tasks.GeneralPoints, "step", step)
    monkeypatch.setattr(E, "generate", lambda model, cache, logits, *rest: ([[tokenizer.eot]] * len(logits), [[-1.0]] * len(logits)))
    for discount, reward in ((1.0, 2.0), (0.5, -0.5)):
        RL.main(f"--init {tiny_run} --out {tmp_path / str(discount)} --steps 1 --problems 1 --group 2 --attempts 2 --max-new-tokens 4 "
                f"--evals 0 --discount {discount}".split())
        assert lines(tmp_path / str(discount))[0]["reward"] == reward

    def answers(*texts):
        e = E.Episode(problem())
        e.append_context([1])
        e.append_response([2], [-0.5])
        e.turns = [{"response": text, "outcome": "illegal", "reward": -3.0, "read": 0.5} for text in texts]
        return e
    groups = [[answers("a", "a", "b"), answers("a")], [answers("a", "b", "a"), answers("c", "c")]]
    metrics = RL.rollout_metrics(groups, torch.tensor([[1.0, 2.0], [3.0, 3.0]]), tokenizer)
    assert metrics["repeat"] == 3 / 5 and metrics["signal"] == 0.5 and metrics["reward"] == 2.25 and metrics["entropy"] == 0.5
    assert metrics["truncated"] == 1.0 and metrics["read"] == 0.5


def test_every_rl_option_runs_together(tiny_run, tmp_path, capsys, uneven_rewards):
    for estimator in RL.ESTIMATORS:
        out = tmp_path / estimator
        RL.main(f"--init {tiny_run} --out {out} --steps 1 --problems 2 --group 2 --attempts 2 --max-new-tokens 5 --eval-n 2 "
                f"--estimator {estimator} {'--ratio sequence --ratio-cap 2 --mask-truncated' * (estimator == 'grpo')} "
                "--epochs 2 --clip-eps 0.2 --clip-eps-high 0.28 --kl-coef 0.05 --discount 0.9 --temperature 0.7 --recompute".split())
        record = lines(out)[0]
        for key in ("reward", "success_1", "success", "signal", "repeat", "tokens", "rollout_seconds", "update_seconds", "kl",
                    "entropy", "clip_fraction", "grad_norm"):
            assert key in record
    assert list((out / "samples").iterdir())
    said = capsys.readouterr().out
    assert "\n    step    done    left  reward success " in said and "\n       1    100% 0:00:0" in said


def test_evaluate_and_report_from_the_command_line(tiny_run, tmp_path, capsys):
    study = tmp_path / "study"
    SFT.main(f"--init {tiny_run} --out {study / 'sft'} --steps 1 --batch 4 --eval-n 5 --eval-split test".split())
    RL.main(f"--init {tiny_run} --out {study / 'rl'} --steps 1 --problems 2 --group 2 --eval-n 5 --eval-split test --max-new-tokens 5".split())
    result = E.main(f"{tiny_run} --n 5 --k 2 --out {study / 'base'} --max-new-tokens 5".split())
    assert set(result["pass_at_k"]) == {"id", "rule", "fake"}
    report.main([str(study)])
    out = capsys.readouterr().out
    assert "RL, end" in out and "base" in out and "Paired difference" in out
    page = (study / "report.html").read_text()
    assert "Content-Security-Policy" in page and "<script" not in page and (study / "curves.svg").is_file()


@pytest.mark.parametrize("argv, words", [
    ("--init nowhere", "not a directory"),
    ("--init x --resume y", "only one"),
    ("--resume nowhere", "no run"),
    ("--steps 0", "--steps"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--task poker", "poker"),
    ("--rule ten", "ten"),
    ("--batch 0", "--batch"),
])
def test_bad_arguments_are_one_sentence(argv, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        SFT.main([*argv.split(), "--out", str(tmp_path / "r")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_run_is_never_overwritten(tiny_run):
    before = sorted(p.name for p in tiny_run.iterdir())
    with pytest.raises(ValueError, match="not empty"):
        SFT.main(f"--steps 1 --batch 4 --eval-n 2 --out {tiny_run}".split())
    assert before == sorted(p.name for p in tiny_run.iterdir())


def test_evaluations_of_a_run_have_the_rule_that_it_trains(tmp_path):
    for flags, rule in (("--rule 7,8,9/target=36", "7,8,9/target=36"), ("", None)):
        out = tmp_path / f"run{bool(rule)}"
        SFT.main(f"{flags} --steps 1 --batch 2 --eval-n 2 --evals 1 --out {out}".split())
        found = [json.loads(path.read_text()) for path in (out / "evals").glob("*.json")]
        assert found and all(each["rule"] == rule and each["visual"] is None for each in found)
        if rule:
            assert "make 36" in found[-1]["samples"][0]["prompt"]
