"""How what is learned follows its gradients: log α, running means; and its checkpoints."""

import math

import pytest
import torch
from conftest import arguments, make_state

from datasets.preprocessing import Data
from run.state import Step
from system.process import ReportedError

CLASSES = 4


def make_data():
    random = torch.Generator().manual_seed(0)
    part = torch.randn(24, 3, 16, 16, generator=random), torch.arange(24) % CLASSES
    settings = {"mean": [0.0] * 3, "std": [1.0] * 3}
    return Data(part, part, part, tuple("abcd"), settings, None)


def some_state(labels="hard", **changes):
    logits = torch.linspace(-1, 1, CLASSES**2).view(CLASSES, CLASSES)
    return make_state(arguments(labels=labels, **changes), make_data(), logits)


def some_step(state, size=1.0, loss=0.5):
    """A step along gradients of this size, of all that is learned."""
    gradients = {name: size * torch.ones_like(t.detach()) for name, t in state.learned.items()}
    return Step(torch.tensor(loss), gradients, {}, "drawn")


def copies(state):
    return {name: tensor.detach().clone() for name, tensor in state.learned.items()}


# --------------------------------------------------------------------------------------------------
# The step size


def test_the_gradient_of_log_alpha_is_alpha_times_that_of_alpha():
    state = some_state(optimizer_lr="log_adam", lr_teacher=0.02)
    state.step(some_step(state, size=3.0))
    assert float(state.learned["alpha"].grad) == pytest.approx(0.02 * 3.0)
    assert state.current_alpha == pytest.approx(0.02 * math.exp(-0.01))  # Adam's rate, of log α


def test_what_is_kept_between_iterations_holds_no_graph():
    state = some_state(objective="loss", optimizer_lr="log_adam", ema=0.5)
    state.step(some_step(state))
    kept = [*state.norms.values(), *state.average.values()]
    kept += [tensor.grad for tensor in state.learned.values()]
    assert len(kept) == 6 and not any(tensor.requires_grad for tensor in kept)


def test_alpha_stays_positive_if_its_logarithm_is_learned_and_only_then():
    states = [some_state(optimizer_lr=name, lr_lr=0.3) for name in ("log_adam", "sgd")]
    faults = [[state.step(some_step(state, size=1e3)) for _ in range(20)] for state in states]
    assert faults[0] == [None] * 20 and 0 < states[0].current_alpha < 1e-3
    assert "α is not positive" in faults[1][0]


def test_engines_differentiate_with_respect_to_alpha_itself():
    for name in ("sgd", "log_adam"):
        *_, alpha = some_state(optimizer_lr=name, lr_teacher=0.02).leaves()
        assert alpha.item() == pytest.approx(0.02) and alpha.is_leaf and alpha.requires_grad


# --------------------------------------------------------------------------------------------------
# Running means


def test_what_is_evaluated_are_running_means_from_the_first_update_on():
    state = some_state("learned", ema=0.75, optimizer_lr="log_adam", lr_img=1.0, lr_labels=0.5)
    initial = copies(state)
    assert torch.equal(state.images, initial["images"])
    state.step(some_step(state, size=1e-2))
    mean = copies(state)
    assert torch.equal(state.images, mean["images"])
    for _ in range(3):
        state.step(some_step(state, size=1e-2))
        mean = {name: 0.75 * mean[name] + 0.25 * now for name, now in copies(state).items()}
    torch.testing.assert_close(state.images, mean["images"])
    torch.testing.assert_close(state.labels, mean["labels"].softmax(1))
    assert state.alpha == pytest.approx(float(mean["alpha"].exp()))
    assert state.alpha != pytest.approx(state.current_alpha)
    assert not torch.equal(state.images, state.learned["images"])


def test_without_running_means_the_latest_is_evaluated():
    state = some_state(lr_img=1.0)
    state.step(some_step(state))
    assert torch.equal(state.images, state.learned["images"])
    assert state.alpha == state.current_alpha


# --------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_of_before_is_not_called_damaged(tmp_path):
    torch.save({"images": torch.zeros(1), "syn_lr": torch.ones(())}, tmp_path / "checkpoint.pt")
    with pytest.raises(ReportedError, match=r"of this version .*--pix_init"):
        some_state().load(tmp_path / "checkpoint.pt")


def test_labels_that_a_checkpoint_brings_are_those_that_the_student_sees(tmp_path):
    state = some_state("soft")
    make_batch = state.batch_maker(lambda images, batch, labels: labels)
    state.save(tmp_path / "checkpoint.pt")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    content["logits"] += torch.eye(CLASSES)
    torch.save(content, tmp_path / "checkpoint.pt")
    state.load(tmp_path / "checkpoint.pt")
    assert torch.equal(make_batch([state.images], None), state.labels)
    torch.testing.assert_close(state.labels, content["logits"].softmax(1))
