"""The student should reach an expert's later epoch (MTT, Cazenavette et al. 2022)."""

from dataclasses import dataclass

import torch

from objectives.segments import Task, make_segments
from trajectories import Experts


def matching_loss(theta_start, theta_target):
    """The objective of MTT (equation 3), for θ*_t and θ*_{t+M}, (P,): a function of θ_N (P,)."""
    distance = (theta_start - theta_target).square().sum()
    return lambda theta: (theta - theta_target).square().sum() / distance


@dataclass(frozen=True)
class MatchTrajectory:
    """The student starts from an expert's epoch t, and should reach epoch t + M.

    T⁺ `max_start_epoch`, M `expert_epochs`.
    """

    experts: Experts
    max_start_epoch: int
    expert_epochs: int
    device: torch.device

    def draw(self, random):
        """A `Task`."""
        expert = int(torch.randint(len(self.experts.members), (1,), generator=random))
        epoch = int(torch.randint(self.max_start_epoch, (1,), generator=random))
        start, target = self.experts.segment(expert, epoch, self.expert_epochs, self.device)
        source = f"{self.experts.members[expert].name}, start epoch {epoch}"
        return Task(start, 0, matching_loss(start, target), {"Start_Epoch": epoch}, source)


def make_trajectory(args, inputs, state):
    """The iteration of --objective=trajectory."""
    experts, device = inputs.experts, inputs.data.device
    if args.load_all:  # otherwise each segment is read from disk, 3 MB for ConvNet
        experts = experts.on_device(args.max_start_epoch + args.expert_epochs, device)
    goal = MatchTrajectory(experts, args.max_start_epoch, args.expert_epochs, device)
    return make_segments(args, inputs, state, goal)
