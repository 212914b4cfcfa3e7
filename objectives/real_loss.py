"""A fresh student should reach a low loss on real images (Wang et al. 2018, RaT-BPTT)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import utils
from datasets.preprocessing import Data
from objectives.segments import Task, make_segments
from utils import Augment


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

    def draw(self, random):
        """A `Task`."""
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


def real_augment(args, form, apply=utils.apply_group):
    """The augmentation of the real images."""
    groups = () if args.no_aug else utils.augment_groups(args.dsa, args.dsa_strategy)
    return Augment(form.im_size, groups, apply=apply)


def make_real_loss(args, inputs, state):
    """The iteration of --objective=loss."""
    apply = utils.group_function(inputs.machine.compiler, inputs.data.device)
    goal = RealLoss(
        model=args.model,
        data=inputs.data,
        augment=real_augment(args, inputs.data.form, apply),
        batch=args.batch_objective,
        total_steps=args.total_steps,
        syn_steps=args.syn_steps,
        loss=inputs.machine.compiler.function(real_loss(inputs.student.once())),
    )
    return make_segments(args, inputs, state, goal)
