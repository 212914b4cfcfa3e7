"""What the student should reach on synthetic images: an expert's epoch, or a low real loss.

Each iteration draws an objective, as a `Task`. Both are functions of the student's parameters θ_N
after the N differentiated steps. reparam_module.py has the mathematics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import utils
from experts import Experts
from preprocessing import Data
from utils import Augment


class Task(NamedTuple):
    """What one iteration differentiates."""

    theta: torch.Tensor  # the student's parameters at the start, (P,)
    steps_before: int  # steps on synthetic images before the differentiated ones
    objective: Callable  # L, a function of θ_N, (P,) → ()
    log: dict  # what is logged about the draw
    source: str  # what was drawn, for messages


def matching_loss(theta_start, theta_target):
    """The objective of MTT (Cazenavette et al. 2022, equation 3), for θ*_t and θ*_{t+M}, (P,)."""
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
    log_key = "Grand_Loss"
    name = "matching loss"

    def draw(self, random):
        expert = int(torch.randint(len(self.experts.members), (1,), generator=random))
        epoch = int(torch.randint(self.max_start_epoch, (1,), generator=random))
        start, target = self.experts.segment(expert, epoch, self.expert_epochs, self.device)
        source = f"{self.experts.members[expert].name}, start epoch {epoch}"
        return Task(start, 0, matching_loss(start, target), {"Start_Epoch": epoch}, source)


@dataclass(frozen=True)
class RealLoss:
    """A fresh student should reach a low loss on a batch of real images, after at most T steps.

    The N differentiated steps are a random window of the T (RaT-BPTT, Feng et al., arXiv
    2311.07025). With T = N, they are all steps (Wang et al. 2018, arXiv 1811.10959).
    """

    model: str  # the student's network
    data: Data
    augment: Augment  # of real images
    batch: int  # real images, at most all of them
    total_steps: int  # T
    syn_steps: int  # N
    loss: Callable  # `real_loss` of the student, compiled
    log_key = "Real_Loss"
    name = "loss on real images"

    def draw(self, random):
        images, labels = self.data.train
        network = utils.initial_network(self.model, self.data.form, random, "cpu")
        theta = parameters_to_vector(network.parameters()).detach()
        (theta,) = utils.send([theta], images.device)  # a GPU waits for nothing
        places = self.total_steps - self.syn_steps + 1
        steps_before = int(torch.randint(places, (1,), generator=random))
        indices = torch.randperm(len(labels), generator=random)[: self.batch]
        (drawn,) = utils.to_device([self.augment.draw(indices, random)], images.device)
        x, y = self.augment(images, drawn, labels)
        log = {"Window_Start": steps_before}
        source = f"window from step {steps_before}"
        return Task(theta, steps_before, lambda theta: self.loss(theta, x, y)[0], log, source)


def real_loss(student):
    """ℓ as a compilable function of θ, images and labels."""

    def loss(theta, x, y):
        return (F.cross_entropy(student(x, theta), y),)

    return loss
