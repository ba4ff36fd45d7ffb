"""Schedules, AdamW, token losses and distillation, by hand: NumPy and the paper's formulas.

A section an equation; nothing here calls what it checks to say what is right.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tessera.data.batch import OFF, ON, Batch
from tessera.objectives import kd as module_of_kd
from tessera.objectives import lm as module_of_lm
from tessera.objectives.kd import KD, KDConfig, raced
from tessera.objectives.lm import LM, SFT, Heldout, by_mode, documents, loss_sums
from tessera.runs.files import RunError
from tessera.train import losses
from tessera.train.optim import TrainConfig, build_optimizer, lr_factor
from tests import tiny

Array = NDArray[np.float64]
CONFIG = TrainConfig(steps=1)


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(logits: Array) -> Array:
    exps = np.exp(logits)
    return exps / exps.sum(-1, keepdims=True)


# Schedules: linear warm-up, then cosine, or stable and linear decay, down to the floor.


def curve(**settings: object) -> list[float]:
    config = TrainConfig(steps=20, **settings)  # type: ignore[arg-type]
    return [lr_factor(config, step) for step in range(20)]


def test_the_warm_up_is_linear_and_its_length_a_share_of_the_steps():
    for schedule in ("cosine", "wsd", "constant"):
        found = curve(schedule=schedule, warmup=0.2)
        assert found[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])
    assert curve(schedule="constant", warmup=0.2)[4:] == [1.0] * 16
    assert curve(schedule="constant", warmup=0.0) == [1.0] * 20


def test_the_cosine_is_half_a_turn_from_one_to_the_floor():
    found = curve(schedule="cosine", warmup=0.2, min_lr=0.3)
    expected = [0.3 + 0.7 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 16)) for s in range(4, 20)]
    assert found[4:] == pytest.approx(expected)
    assert found[12] == pytest.approx(0.65)  # half-way, half of what is above the floor
    # One step more would be the floor itself.
    config = TrainConfig(steps=20, schedule="cosine", warmup=0.2, min_lr=0.3)
    assert lr_factor(config, 20) == pytest.approx(0.3)
    assert lr_factor(TrainConfig(steps=1, warmup=0.0), 0) == 1.0


def test_warm_up_stable_decay_falls_linearly_to_the_floor_over_its_share():
    found = curve(schedule="wsd", warmup=0.1, decay=0.25, min_lr=0.2)
    assert found[:2] == pytest.approx([1 / 3, 2 / 3])
    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([1 - 0.8 / 5, 1 - 1.6 / 5, 1 - 2.4 / 5, 1 - 3.2 / 5])
    config = TrainConfig(steps=20, schedule="wsd", warmup=0.1, decay=0.25, min_lr=0.2)
    assert lr_factor(config, 20) == pytest.approx(0.2)
    # All of the steps are spent decaying, and no step is.
    assert curve(schedule="wsd", warmup=0.0, decay=1.0, min_lr=0.0) == pytest.approx(
        [1 - s / 20 for s in range(20)]
    )
    assert curve(schedule="wsd", warmup=0.0, decay=0.01, min_lr=0.0) == [1.0] * 20


def test_a_schedule_of_one_step_begins_at_its_peak():
    for schedule in ("cosine", "wsd", "constant"):
        config = TrainConfig(steps=1, schedule=schedule, warmup=0.0, decay=0.2)
        assert lr_factor(config, 0) == 1.0
    two = TrainConfig(steps=2, schedule="wsd", warmup=0.0, decay=0.5, min_lr=0.0)
    assert [lr_factor(two, step) for step in (0, 1, 2)] == [1.0, 1.0, 0.0]


# AdamW (Loshchilov & Hutter, 1711.05101): decay apart from the gradient, moments unbiased.


def test_two_steps_of_adamw():
    config = TrainConfig(steps=2, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    matrix = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    vector = torch.nn.Parameter(torch.tensor([3.0]))
    fixed = torch.nn.Parameter(torch.tensor([[7.0]]), requires_grad=False)
    optimizer = build_optimizer([matrix, vector, fixed], config)
    gradients = [[0.5, -1.0, 2.0], [1.5, 1.0, -1.0]]
    for one in gradients:
        matrix.grad, vector.grad = torch.tensor([one[:2]]), torch.tensor(one[2:])
        optimizer.step()
    found = [*matrix[0].tolist(), *vector.tolist()]
    for number, (start, decay) in enumerate([(1.0, 0.5), (-2.0, 0.5), (3.0, 0.0)]):
        p, m, v = start, 0.0, 0.0
        for step, one in enumerate(gradients, 1):
            g = one[number]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            moments = (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
            p = p - 0.1 * decay * p - 0.1 * moments
        assert found[number] == pytest.approx(p, rel=1e-5)
    assert fixed.item() == 7.0


# Token losses: sums of w·ℓ through the head, and their slopes.

HIDDEN = [[1.0, 0.5, -1.0], [0.0, 2.0, 1.0]]  # through the identity they are the logits
PARENT = [[0.2, 0.1, 0.4], [1.0, -1.0, 0.0]]
WEIGHT = [0.5, 2.0]


def test_cross_entropy_is_the_negative_log_of_the_labels_share():
    hidden = torch.tensor(HIDDEN, requires_grad=True)
    loss = losses.cross_entropy(hidden, torch.eye(3), torch.tensor([2, 1]), torch.tensor(WEIGHT))
    q = softmax(np.array(HIDDEN))
    assert loss.item() == pytest.approx(-0.5 * math.log(q[0, 2]) - 2.0 * math.log(q[1, 1]))
    (slope,) = torch.autograd.grad(loss, hidden)
    labels = np.array([[0, 0, 1], [0, 1, 0]])
    np.testing.assert_allclose(array(slope), (q - labels) * [[0.5], [2.0]], rtol=1e-5)


def test_kl_is_of_the_parent_from_the_child_at_temperature_one():
    """Puzzle §2.7: Σ_v p log(p / q), p the parent's."""
    hidden = torch.tensor(HIDDEN, requires_grad=True)
    parent, eye = torch.tensor(PARENT), torch.eye(3)
    loss = losses.kl_divergence(hidden, eye, parent, eye, torch.tensor(WEIGHT))
    p, q = softmax(np.array(PARENT)), softmax(np.array(HIDDEN))
    kl = (p * np.log(p / q)).sum(-1)
    assert loss.item() == pytest.approx(0.5 * kl[0] + 2.0 * kl[1], rel=1e-5)
    (slope,) = torch.autograd.grad(loss, hidden)
    np.testing.assert_allclose(array(slope), (q - p) * [[0.5], [2.0]], rtol=1e-4, atol=1e-6)
    found = losses.token_statistics(hidden, eye, parent.__getitem__, torch.tensor([2, 1]))
    np.testing.assert_allclose(array(found["kl"]), kl, rtol=1e-5)
    np.testing.assert_allclose(
        array(found["lm_loss"]), [-math.log(q[0, 2]), -math.log(q[1, 1])], rtol=1e-5
    )
    assert found["agreement"].tolist() == [0.0, 0.0]  # likeliest: 0 and 1 here, 2 and 0 there


def test_a_curve_of_log_probs_is_summed_with_its_slope_and_told_the_entropy():
    hidden = torch.tensor(HIDDEN, requires_grad=True)
    told: list[float] = []

    def square(log_prob, entropy, part):
        told.extend(entropy.tolist())
        return log_prob**2, 2 * log_prob

    labels = torch.tensor([2, 1])
    loss = losses.log_prob_loss(hidden, torch.eye(3), labels, torch.tensor(WEIGHT), square)
    q = softmax(np.array(HIDDEN))
    own = np.log([q[0, 2], q[1, 1]])
    assert loss.item() == pytest.approx(0.5 * own[0] ** 2 + 2.0 * own[1] ** 2, rel=1e-5)
    assert told == pytest.approx((-(q * np.log(q)).sum(-1)).tolist(), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, hidden)
    onehot = np.array([[0, 0, 1], [0, 1, 0]])
    expected = (2 * own * WEIGHT)[:, None] * (onehot - q)
    np.testing.assert_allclose(array(slope), expected, rtol=1e-4)
    found = losses.token_log_probs(hidden, torch.eye(3), labels)
    np.testing.assert_allclose(array(found), own, rtol=1e-5)
    assert losses.token_log_probs(hidden[:0], torch.eye(3), labels[:0]).shape == (0,)


def test_the_cosine_is_one_less_the_angles_cosine_summed_by_weight():
    child = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    parent = torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    loss = losses.hidden_cosine(child, parent, torch.tensor([0.5, 2.0]))
    assert loss.item() == pytest.approx(0.5 * (1 - 24 / 25) + 2.0 * 2.0)
    (slope,) = torch.autograd.grad(loss, child)
    # -y/(|x||y|) + cos·x/|x|², of the first token times its weight; none along the second.
    expected = 0.5 * (-np.array([4, 3]) / 25 + 24 / 25 * np.array([3, 4]) / 25)
    np.testing.assert_allclose(array(slope), [expected, [0, 0]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_no_chunk_holds_more_than_its_devices_portion(device: str):
    """16 MiB of float32 logits on a CPU, 512 MiB elsewhere."""
    rows = torch.empty(5000, 1, device="cpu" if device == "cpu" else "meta")
    most = {"cpu": 2**22, "meta": 2**27}[rows.device.type] // 1000
    sizes = [part.stop - part.start for part in losses.chunks(rows, 1000)]
    whole, rest = divmod(5000, most)
    assert sizes == [most] * whole + ([rest] if rest else [])
    assert [p.start for p in losses.chunks(rows, 1 << 30)][:3] == [0, 1, 2]


# Fine-tuning: cross-entropy of the trained tokens only, and apart for the two modes (paper §4).


def batch(modes: bool = False) -> Batch:
    """Two rows: a document of 3 and one of 2 tokens; one of 4 tokens and padding."""
    ids = tiny.tokens(29, 2, 6, seed=3)
    weight = torch.tensor([[1.0, 0.0, 0.5, 1.0, 2.0], [0.0, 1.0, 1.0, 0.0, 0.0]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]])
    mode = torch.tensor([[ON] * 3 + [OFF] * 2, [OFF] * 5]) if modes else None
    return Batch(ids[:, :-1], ids[:, 1:], weight, positions, segments, mode)


def places(given: Batch) -> list[tuple[int, slice]]:
    return [(0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 4))]


def alone(module, given: Batch) -> tuple[Array, list[Array]]:
    """(log-probs (B,T,V), the stream leaving each layer (B,T,C)), document by document."""
    shape = given.tokens.shape
    log_probs = np.zeros((*shape, module.config.vocab_size))
    states = [np.zeros((*shape, module.config.hidden_size)) for _ in module.blocks]
    for row, part in places(given):
        _, *streams = module.hidden_states(given.tokens[row : row + 1, part])
        logits = array(module.norm(streams[-1]))[0] @ array(module.head).T
        log_probs[row, part] = np.log(softmax(logits))
        for held, stream in zip(states, streams, strict=True):
            held[row, part] = array(stream)[0]
    return log_probs, states


def negative_log(log_probs: Array, given: Batch) -> Array:
    return -np.take_along_axis(log_probs, given.labels.numpy()[..., None], -1)[..., 0]


def test_the_loss_of_text_and_of_chats_is_the_sum_of_weighted_surprise():
    module, given = tiny.model(tiny.PARENT), batch(modes=True)
    loss = negative_log(alone(module, given)[0], given) * given.weight.numpy()
    ((text, none),) = LM().losses(module, given)
    assert text.item() == pytest.approx(loss.sum(), rel=1e-5) and none == {}
    ((chat, told),) = SFT().losses(module, given)
    assert chat.item() == pytest.approx(loss.sum(), rel=1e-5)
    on, off = loss[0, :3].sum(), loss[0, 3:].sum() + loss[1].sum()
    assert float(told["loss_on"]) == pytest.approx(on, rel=1e-5)
    assert float(told["loss_off"]) == pytest.approx(off, rel=1e-5)
    assert (float(told["loss_on/weight"]), float(told["loss_off/weight"])) == (1.5, 5.0)
    assert SFT().weight(given) == LM().weight(given) == 6.5
    plain = batch()
    assert {name: one.tolist() for name, one in by_mode(plain).items()} == {
        "on": [], "off": [], "text": [0, 2, 3, 4, 6, 7]}  # fmt: skip
    ((chat, told),) = SFT().losses(module, plain)
    assert chat.item() == pytest.approx(loss.sum(), rel=1e-5)
    assert float(told["loss_on/weight"]) == 0.0
    sums = loss_sums(SFT(), module, [given, given])
    expected = [[2 * loss.sum(), 13.0], [2 * on, 3.0], [2 * off, 10.0]]
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-5)


class Parts:
    """Prepared data of two sources, the second twice as long."""

    parts = (SimpleNamespace(name="a"), SimpleNamespace(name="b"))

    def heldout_batches(self, source: str) -> list[Batch]:
        return [batch(modes=True)] if source == "a" else [batch(modes=True).each(further)] * 2


def further(tensor: torch.Tensor) -> torch.Tensor:
    """The other row first."""
    return tensor.flip(0)


def test_a_held_out_loss_is_a_mean_over_tokens_and_apart_by_source_or_mode(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module_of_lm, "documents", lambda *given: Parts())
    module, given = tiny.model(tiny.PARENT), batch(modes=True)
    given.weight[0, 0] = 3.0
    loss = negative_log(alone(module, given)[0], given) * batch().weight.numpy()
    each, weight = loss.sum(), batch().weight.sum().item()
    path: Any = None
    found = Heldout(LM(), module, path, CONFIG, 0)()
    assert found == pytest.approx(
        {"heldout": each / weight, "heldout/a": each / weight, "heldout/b": each / weight}, rel=1e-5
    )
    on, off = loss[0, :3].sum() / 1.5, (loss[0, 3:].sum() + loss[1].sum()) / 5.0
    found = Heldout(SFT(), module, path, CONFIG, 0)()
    assert found == pytest.approx(
        {"heldout": each / weight, "heldout_on": on, "heldout_off": off}, rel=1e-5
    )
    monkeypatch.setattr(Parts, "parts", Parts.parts[:1])
    assert set(Heldout(LM(), module, path, CONFIG, 0)()) == {"heldout"}
    unweighed = batch().each(torch.clone)
    unweighed.weight[1] *= 2.0
    monkeypatch.setattr(Parts, "heldout_batches", lambda self, source: [unweighed])
    total = (negative_log(alone(module, given)[0], given) * unweighed.weight.numpy()).sum()
    found = Heldout(LM(), module, path, CONFIG, 0)()
    assert found["heldout"] == pytest.approx(total / unweighed.weight.sum().item(), rel=1e-5)


@pytest.mark.parametrize("alike", [False, True])
def test_documents_are_cut_to_a_stages_sizes_and_shared_between_its_processes(
    alike: bool, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(module_of_lm, "Documents", lambda data, **told: seen.update(told))
    sizes = {"sequence_length": 8, "microbatch_tokens": 32, "tokens_per_step": 64}
    spread = SimpleNamespace(layout=SimpleNamespace(data_rank=2, data_world=4))
    config: Any = SimpleNamespace(**sizes, placement=spread)
    documents(Path("x"), config, 7, "heldout", alike=alike)
    assert seen == {
        **sizes, "row_length": 32, "seed": 7, "split": "heldout",
        "shard": (0, 1) if alike else (2, 4)}  # fmt: skip
    documents(Path("x"), config, 7)
    assert seen["split"] == "train" and seen["shard"] == (2, 4)


# Global distillation (Puzzle §2.7): ℓ = KL(p_parent ‖ p_child) + α Σ_l (1 - cos) + λ LM.


@pytest.mark.parametrize(("cosine", "lm"), [(1.0, 0.0), (0.25, 0.0), (0.0, 0.0), (0.5, 0.3)])
def test_distillation_is_kl_and_the_cosine_summed_over_layers(cosine: float, lm: float):
    parent, child = tiny.model(tiny.PARENT, seed=1), tiny.model(tiny.PARENT, seed=2)
    parent.requires_grad_(False)
    given = batch()
    log_p, theirs = alone(parent, given)
    log_q, ours = alone(child, given)
    weight = given.weight.numpy()
    kl = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * weight).sum()
    apart = 0.0
    for x, y in zip(ours, theirs, strict=True):
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        angle = (x * y).sum(-1) / np.where(norms > 0, norms, 1.0)
        apart += ((1 - angle) * weight).sum()
    surprise = (negative_log(log_q, given) * weight).sum()
    config = KDConfig(train=CONFIG, cosine=cosine, lm=lm)
    ((loss, told),) = KD(parent, config).losses(child, given)
    assert loss.item() == pytest.approx(kl + cosine * apart + lm * surprise, rel=1e-4)
    assert told["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert set(told) == {"kl", *(["cosine"] if cosine else []), *(["lm"] if lm else [])}
    if cosine:
        assert told["cosine"].item() == pytest.approx(apart, rel=1e-4)
    if lm:
        assert told["lm"].item() == pytest.approx(surprise, rel=1e-4)


def test_the_papers_weights_are_the_defaults():
    """Equal parts of KL and cosine, no LM loss: the best row of the ablation."""
    config = KDConfig(train=CONFIG)
    assert (config.cosine, config.lm) == (1.0, 0.0)


def test_a_winners_learning_rate_replaces_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = KDConfig(train=TrainConfig(steps=1, lr=5e-4), lr_from="race")
    (tmp_path / "tables").mkdir()
    for table in (None, {"words": []}):
        if table is not None:
            (tmp_path / "tables" / "architecture.json").write_text(json.dumps(table))
        with pytest.raises(RunError, match="lr_from"):
            raced(config, tmp_path)
    (tmp_path / "tables" / "architecture.json").write_text(json.dumps({"lr": 0.25}))
    found = raced(config, tmp_path)
    assert found.train.lr == 0.25 and found.train.steps == 1 and config.train.lr == 5e-4
    plain = config.model_copy(update={"lr_from": None})
    assert raced(plain, tmp_path) is plain

    def notes(of: KDConfig, model: Path | None) -> list[str]:
        return of.notes(SimpleNamespace(inputs={"model": model}))  # type: ignore[arg-type]

    assert notes(plain, tmp_path) == [] == notes(config, None)
    (unmade,) = notes(config, tmp_path)
    assert "0.25" not in unmade and "0.0005" in unmade
    monkeypatch.setattr(module_of_kd, "is_done", lambda model: True)
    (made,) = notes(config, tmp_path)
    assert "0.25" in made and "0.0005" in made
