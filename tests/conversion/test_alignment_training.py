"""Joint training: it learns, recovers a planted MoE, resumes bit for bit, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alignment_cases import planted, tiny_llama, token_chunks
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import one_hot

from monge.conversion.alignment import PAPER, AlignmentConfig, align
from monge.conversion.ffn import find_ffns
from monge.conversion.types import DROPPED, SHARED, ExpertShape, Partition

SHAPE = ExpertShape(neurons=24, groups=6, active=3, shared=1)
FIXED = AlignmentConfig(learn_partition=False)


def mean_of(trace, first, last):
    return sum(trace[first:last]) / len(trace[first:last])


def run(model=None, *, steps=30, config=None, chunks=None, shape=SHAPE, **options):
    model = model or tiny_llama()
    ffns = find_ffns(model)
    shapes = [shape] * len(ffns)
    return align(model, ffns, chunks or token_chunks(), shapes, config=config, steps=steps, **options)


def dealt(shape=SHAPE, layers=2, seed=0):
    """Random partitions with the first neurons shared."""
    partitions = []
    for layer in range(layers):
        generator = torch.Generator().manual_seed(100 * seed + layer)
        labels_F = torch.full((shape.neurons,), SHARED)
        rest = torch.arange(shape.neurons - shape.shared_neurons) % shape.routed
        labels_F[shape.shared_neurons :] = rest[torch.randperm(len(rest), generator=generator)]
        partitions.append(Partition(labels_F))
    return partitions


@pytest.mark.parametrize("config", [AlignmentConfig(), replace(PAPER, affinity_rate=0.02, router_rate=0.02)])
def test_the_distance_to_the_dense_model_falls_and_partitions_are_balanced(config):
    aligned = run(steps=60, config=config)
    kl = aligned.history["kl"]
    assert mean_of(kl, -12, None) < 0.8 * mean_of(kl, 0, 12)
    for partition in aligned.partitions:
        labels_F = partition.labels_F
        assert (labels_F == SHARED).sum() == SHAPE.shared_neurons == 4
        assert labels_F[labels_F >= 0].bincount().tolist() == [4] * 5
        assert partition.router_NH.shape == (5, 16)
    assert all(len(trace) == 60 for trace in aligned.history.values())


def test_the_freeze_ends_all_changes_of_expert():
    changed = run(steps=50, config=AlignmentConfig(freeze_at=0.6)).history["changed"]
    assert max(changed[:30]) > 0
    assert changed[31:] == [0] * 19  # step 30 goes from the last labels to those of the average
    assert sum(run(steps=50, config=AlignmentConfig(freeze_at=1.0)).history["changed"][31:]) > 0


def test_fixed_partitions_stay_and_their_routers_learn():
    partitions, chunks = dealt(), token_chunks(2)
    aligned = run(steps=60, config=FIXED, partitions=partitions, chunks=chunks)
    for before, after in zip(partitions, aligned.partitions):
        assert torch.equal(before.labels_F, after.labels_F)
    kl = aligned.history["kl"]
    assert mean_of(kl, -6, None) < 0.9 * mean_of(kl, 0, 6)
    assert set(aligned.history["changed"]) == {0}


def test_given_routers_are_where_training_starts():
    routers = [torch.randn(5, 16) for _ in range(2)]
    aligned = run(steps=1, config=replace(FIXED, router_rate=0.0), partitions=dealt(), routers=routers)
    assert all(torch.equal(a, b) for a, b in zip(aligned.routers, routers))
    own = [Partition(p.labels_F, r) for p, r in zip(dealt(), routers)]
    aligned = run(steps=1, config=replace(FIXED, router_rate=0.0), partitions=own)
    assert all(torch.equal(a, b) for a, b in zip(aligned.routers, routers))


def test_learning_from_a_partition_starts_in_it_and_leaves_it():
    partitions = dealt()
    config = AlignmentConfig(freeze_at=1.0)
    still = run(steps=1, config=replace(config, affinity_rate=0.0), partitions=partitions)
    assert still.history["changed"] == [0]
    for head_start, moves in ((0.2, True), (5.0, False)):  # too sure of itself to learn in 40 steps
        after = run(steps=40, config=replace(config, head_start=head_start), partitions=partitions)
        assert (sum(after.history["changed"]) > 0) == moves


def test_frozen_weights_are_untouched_and_the_model_is_left_as_it_was():
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    trainable = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert trainable == {"model.embed_tokens.weight"}
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_trained_weights_move_towards_the_dense_model_as_it_was():
    model, chunks = tiny_llama(), token_chunks(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    partitions = dealt()
    frozen = run(steps=60, config=FIXED, partitions=partitions, chunks=chunks)
    config = replace(FIXED, weight_rate=3e-3)
    trained = run(model, steps=60, config=config, partitions=partitions, chunks=chunks)
    assert trained.history["kl"][0] == frozen.history["kl"][0]
    assert trained.history["loss"][-1] < 0.8 * frozen.history["loss"][-1]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "model.layers.0.mlp.down_proj.weight" in moved
    assert "model.layers.1.self_attn.q_proj.weight" in moved
    assert not moved & {"model.embed_tokens.weight", "lm_head.weight"}


def test_pruned_layers_have_no_router_and_train_only_with_their_weights():
    labels_F = torch.full((24,), DROPPED)
    labels_F[:12] = SHARED
    partitions = [Partition(labels_F)] * 2
    with pytest.raises(ValueError, match="nothing to train"):
        run(config=FIXED, partitions=partitions)
    config = replace(FIXED, weight_rate=3e-3)
    aligned = run(steps=40, config=config, partitions=partitions, chunks=token_chunks(1))
    assert aligned.history["loss"][-1] < aligned.history["loss"][0]
    assert aligned.routers == [None, None]


class Killed(Exception):
    pass


class KillAt:
    """An observer that interrupts after so many steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def stage(self, name, total):
        pass

    def message(self, text):
        pass

    def advance(self, steps=1, note=""):
        self.left -= steps
        if self.left <= 0:
            raise Killed


# frozen before step 14, checkpoints after 5, 10, ... steps
@pytest.mark.parametrize(("kill_at", "weight_rate"), [(7, 0.0), (14, 1e-3), (15, 0.0), (26, 1e-3)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, kill_at, weight_rate):
    config = AlignmentConfig(freeze_at=0.5, checkpoint_every=5, weight_rate=weight_rate)
    whole_model = tiny_llama()
    whole = run(whole_model, steps=28, config=config, seed=3)
    path = tmp_path / "align.safetensors"
    with pytest.raises(Killed):
        run(steps=28, config=config, seed=3, checkpoint=path, observer=KillAt(kill_at))
    model = tiny_llama()
    resumed = run(model, steps=28, config=config, seed=3, checkpoint=path)
    assert resumed.history == whole.history
    for a, b in zip(resumed.partitions, whole.partitions):
        assert torch.equal(a.labels_F, b.labels_F)
        assert torch.equal(a.router_NH, b.router_NH)
    weights = zip(model.state_dict().values(), whole_model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("freeze_at", [0.5, 1.0])
def test_a_finished_run_is_read_back(tmp_path, freeze_at):
    config, path = AlignmentConfig(freeze_at=freeze_at), tmp_path / "align.safetensors"
    first = run(steps=10, config=config, checkpoint=path)
    again = run(steps=10, config=config, checkpoint=path)
    assert again.history == first.history
    for a, b in zip(again.partitions, first.partitions):
        assert torch.equal(a.labels_F, b.labels_F)
        assert torch.equal(a.router_NH, b.router_NH)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "align.safetensors"
    run(steps=4, checkpoint=path)
    with pytest.raises(ValueError, match=r"align\.safetensors.*other settings"):
        run(steps=5, checkpoint=path)
    with pytest.raises(ValueError, match=r"align\.safetensors"):
        run(steps=4, checkpoint=path, shape=ExpertShape(24, 4, 2, 0))
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"align\.safetensors.*Delete it"):
        run(steps=4, checkpoint=path)


def agreement(labels_F, found_F):
    """Share of the neurons in the right expert, under the best naming of the experts found."""
    together = one_hot(labels_F).T @ one_hot(found_F)
    rows, columns = linear_sum_assignment(-together.numpy())
    return together[rows, columns].sum().item() / len(labels_F)


def test_a_planted_moe_is_found_from_one_of_its_halves():
    model, labels_F, shape = planted()
    router_NH = (torch.arange(4)[:, None] == torch.arange(16) // 4).float()  # reads every cluster's block
    config = AlignmentConfig(affinity_rate=5e-2, router_rate=0.0, weight_decay=0.0)
    neurons = run(model, steps=60, config=config, shape=shape, routers=[router_NH])
    assert agreement(labels_F, neurons.partitions[0].labels_F) >= 0.75  # the others hardly ever fire
    assert mean_of(neurons.history["kl"], -10, None) < 0.005
    fixed = replace(FIXED, router_rate=2e-2)
    tokens = run(model, steps=60, config=fixed, shape=shape, partitions=[Partition(labels_F)])
    assert mean_of(tokens.history["kl"], 0, 10) > 0.1
    assert mean_of(tokens.history["kl"], -10, None) < 1e-4


def test_a_planted_moe_is_found_from_nothing_better_than_by_lot():
    model, labels_F, shape = planted()
    config = AlignmentConfig(router_rate=2e-2)
    learned = run(model, steps=150, config=config, shape=shape)
    fixed = replace(FIXED, router_rate=2e-2)
    control = run(model, steps=150, config=fixed, shape=shape, partitions=dealt(shape, 1))
    found, by_lot = (agreement(labels_F, a.partitions[0].labels_F) for a in (learned, control))
    assert found > by_lot + 0.1
    assert mean_of(learned.history["kl"], -20, None) < 0.5 * mean_of(control.history["kl"], -20, None)


def test_arguments_that_do_not_fit_are_named():
    good = dealt()
    with pytest.raises(ValueError, match="partitions is None"):
        run(config=FIXED)
    with pytest.raises(ValueError, match="steps and chunks"):
        run(steps=0)
    with pytest.raises(ValueError, match=r"partitions\[1\].*5 routed experts"):
        run(partitions=[good[0], Partition(good[1].labels_F + 1)])
    with pytest.raises(ValueError, match=r"partitions\[0\] has labels \(3,\)"):
        run(partitions=[Partition(torch.tensor([0, 1, 2])), good[1]])
    with pytest.raises(ValueError, match=r"routers\[0\] has 4 rows"):
        run(partitions=good, routers=[torch.zeros(4, 16)] * 2)


def test_a_loss_that_is_not_finite_is_reported_with_its_step():
    model = tiny_llama()
    ffns = find_ffns(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="step 1 of 30"):
        align(model, ffns, token_chunks(), [SHAPE] * 2, steps=30)
    assert not any(module._forward_pre_hooks for module in model.modules())
