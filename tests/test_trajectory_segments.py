"""The segments of experts' trajectories that a student has to match."""

import math

import pytest
import torch

from system.process import ReportedError
from trajectories import Expert, Experts

NAME = "replay_buffer_0.pt"


def expert_of(*values, name=NAME, record=None):
    """An expert with a snapshot for each value, of two parameters that both have it."""
    snapshots = [[torch.full((2, 2), float(v)), torch.full((1,), float(v))] for v in values]
    return Expert(snapshots, name, record)


def record_of(loss=0.5, test_accuracy=0.9, **settings):
    """The record of an expert of one epoch."""
    expert = {"seed": 0, "loss": [loss], "test_accuracy": [test_accuracy]}
    return {"settings": settings, "training": {"epochs": 1}, "expert": expert}


def test_a_segment_joins_two_snapshots_of_one_expert():
    snapshots = [[torch.full((2, 2), 10.0 + t), torch.full((1,), -1.0)] for t in range(5)]
    experts = Experts([expert_of(*range(5)), Expert(snapshots, NAME, None)])
    start, target = experts.segment(1, 1, 3, "cpu")
    assert start.tolist() == [11, 11, 11, 11, -1] and target.tolist() == [14, 14, 14, 14, -1]


def test_on_the_device_segments_are_the_same():
    experts = Experts([expert_of(*range(5)), expert_of(*range(10, 16))])
    moved = experts.on_device(4, "cpu")
    assert [len(expert.trajectory) for expert in moved.members] == [4, 4]
    for number in range(2):
        segments = (e.segment(number, 1, 2, "cpu") for e in (experts, moved))
        assert all(torch.equal(theta, other) for theta, other in zip(*segments))


@pytest.mark.parametrize(
    "values, fault",
    [
        ((1, 0, 1), "is the same at epochs 0 and 2"),
        ((1, math.nan, 2), "is not finite at epoch 1"),
        ((1, 0, math.inf), "is not finite at epoch 2"),
    ],
)
def test_a_damaged_expert_is_named_or_left_out(values, fault):
    damaged = Experts([expert_of(*values)])
    with pytest.raises(ReportedError, match=f"{NAME} {fault}.*--skip_damaged"):
        damaged.with_whole_segments(1, 2, skip_damaged=False)
    whole = Experts([expert_of(0, 1, 2)])
    both = Experts(damaged.members + whole.members)
    with pytest.warns(UserWarning, match=fault):
        assert both.with_whole_segments(1, 2, skip_damaged=True).members == whole.members
    message = "no expert is left"
    with pytest.warns(UserWarning, match=fault), pytest.raises(ReportedError, match=message):
        damaged.with_whole_segments(1, 2, skip_damaged=True)


def test_only_segments_that_can_be_drawn_are_looked_at():
    experts = Experts([expert_of(0, 1, 2, math.nan)])
    assert experts.with_whole_segments(1, 2, skip_damaged=False).members == experts.members


@pytest.mark.parametrize(
    "max_start_epoch, length, fits", [(1, 3, True), (2, 2, True), (2, 3, False)]
)
def test_the_shortest_expert_must_be_long_enough_for_the_last_segment(
    max_start_epoch, length, fits
):
    experts = Experts([expert_of(*range(6)), expert_of(*range(4))])
    if fits:
        experts.check_epochs(max_start_epoch, length)
    else:
        with pytest.raises(ReportedError, match=f"experts of 4 epochs; {NAME} has 3"):
            experts.check_epochs(max_start_epoch, length)
        with pytest.raises(ReportedError, match="experts of 4 epochs; these have 3"):
            Experts(experts.members[1:]).check_epochs(max_start_epoch, length)


@pytest.mark.parametrize("syn_steps, warns", [(4, False), (5, True)])
def test_a_student_of_more_steps_than_its_experts_have_is_warned_of(syn_steps, warns, recwarn):
    record = record_of()
    record["training"]["batch_size"] = 10
    experts = Experts([expert_of(0, 1, record=record), expert_of(0, 1)])
    experts.warn_of_few_steps(syn_steps, expert_epochs=2, num_train=11)  # two steps an epoch
    warned = [str(w.message) for w in recwarn]
    assert bool(warned) == warns
    assert all("4 steps" in text and "--batch_train" in text for text in warned)


def test_experts_made_otherwise_are_refused_if_that_is_recorded():
    recorded = expert_of(0, 1, record=record_of(model="MLP"))
    Experts([recorded, expert_of(0, 1)]).check_settings({"model": "MLP"})
    with pytest.raises(ReportedError, match=f"{NAME} .*model='MLP' .*'ConvNet'"):
        Experts([recorded, expert_of(0, 1)]).check_settings({"model": "ConvNet"})


def test_accuracies_are_of_those_experts_that_have_a_record():
    experts = [expert_of(0, 1, record=record_of(test_accuracy=a)) for a in (0.7, 0.8)]
    assert Experts([*experts, expert_of(0, 1)]).test_accuracies == [0.7, 0.8]


def test_every_other_set_of_experts_has_another_digest():
    def recorded(last=1, **changes):
        return expert_of(0, last, record=record_of(**changes))

    sets = [
        [recorded()],
        [recorded(), recorded()],
        [recorded(), recorded(loss=0.25)],
        [recorded(loss=0.25), recorded()],
        [recorded(model="MLP")],
        [recorded(last=2)],
        [expert_of(0, 1)],
        [expert_of(0, 2)],
        [expert_of(0, 1), expert_of(0, 2)],
        [expert_of(0, 1), expert_of(0, 3)],
    ]
    digests = [Experts(members).digest() for members in sets]
    assert len(set(digests)) == len(sets)
    assert Experts([recorded()]).digest() == digests[0]
    renamed = expert_of(0, 1, name="elsewhere", record=record_of())
    assert Experts([renamed]).digest() == digests[0]  # wherever they are
