"""Both objectives: what they draw, exact gradients, learned labels; by hand and by commands."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import arguments, make_state
from torch.nn import functional as F

import utils
from datasets.preprocessing import Data
from networks import ConvNet
from objectives import segments
from objectives.real_loss import RealLoss, real_loss
from objectives.trajectory import MatchTrajectory, matching_loss
from reparam_module import UNROLLS, AdjointUnroll, AutogradUnroll, ReparamModule
from run import report, wandb_page
from run.state import Step
from system.compilation import FAILURES, Compiler
from system.machine import Machine
from system.ranks import ALONE
from trajectories import Expert, Experts
from utils import Augment

CLASSES = 4
DSA = utils.augment_groups(True, utils.DSA_STRATEGY)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_data(count=24):
    images = torch.randn(count, 3, 16, 16, generator=seeded(0))
    part = images, torch.arange(count) % CLASSES
    settings = {"mean": [0.0] * 3, "std": [1.0] * 3}
    return Data(part, part, part, tuple("abcd"), settings, None)


def make_student(act="relu"):
    torch.manual_seed(0)
    return ReparamModule(ConvNet(3, CLASSES, 16, width=4, depth=2, act=act).double())


def make_objective(student, **changes):
    settings = {"batch": 8, "total_steps": 7, "syn_steps": 3} | changes
    return RealLoss(
        model="ConvNetD1",
        data=make_data(),
        augment=Augment(16, DSA),
        loss=real_loss(student),
        **settings,
    )


# --------------------------------------------------------------------------------------------------
# What is drawn


def test_each_student_is_fresh_and_its_window_is_anywhere_among_its_steps():
    objective = make_objective(ReparamModule(ConvNet(3, CLASSES, 16, depth=1)))
    random = seeded(0)
    tasks = [objective.draw(random) for _ in range(60)]
    assert {task.steps_before for task in tasks} == set(range(5))
    assert all(task.log == {"Window_Start": task.steps_before} for task in tasks)
    assert not torch.equal(tasks[0].theta, tasks[1].theta)
    again = objective.draw(seeded(0))
    assert torch.equal(again.theta, tasks[0].theta)
    assert again.objective(again.theta) == tasks[0].objective(again.theta)


def test_a_window_as_long_as_all_steps_is_all_of_them():
    objective = make_objective(ReparamModule(ConvNet(3, CLASSES, 16, depth=1)), total_steps=3)
    assert {objective.draw(seeded(k)).steps_before for k in range(5)} == {0}


@pytest.mark.parametrize("batch, seen", [(8, 8), (24, 24), (100, 24)])
def test_the_loss_is_that_of_a_batch_of_different_real_images(batch, seen):
    batches = []

    def loss(theta, x, y):
        batches.append((x, y))
        return (theta.sum(),)

    objective = make_objective(None, batch=batch)
    objective = RealLoss(**vars(objective) | {"loss": loss, "augment": Augment(16)})
    task = objective.draw(seeded(0))
    assert task.objective(torch.ones(3)) == 3
    ((x, y),) = batches
    images, labels = objective.data.train
    found = [(images == image).all((1, 2, 3)).nonzero().item() for image in x]
    assert len(set(found)) == len(x) == seen
    assert torch.equal(y, labels[found])


def test_a_trajectory_is_followed_from_an_epoch_to_one_that_is_m_later():
    snapshots = [[torch.full((5,), float(10 * k + t)) for t in range(6)] for k in range(2)]
    experts = Experts([Expert([[part] for part in own], "expert", None) for own in snapshots])
    objective = MatchTrajectory(experts, 3, 2, torch.device("cpu"))
    random, starts = seeded(0), set()
    for _ in range(40):
        task = objective.draw(random)
        start = int(task.theta[0])
        starts.add(start)
        assert (task.steps_before, task.log) == (0, {"Start_Epoch": start % 10})
        assert task.objective(task.theta) == 1  # at its start
        assert task.objective(torch.full((5,), start + 2.0)) == 0  # at its target
    assert starts == {0, 1, 2, 10, 11, 12}


# --------------------------------------------------------------------------------------------------
# Gradients


def iterate(engine, student, images, logits, alpha):
    """Loss and gradients behind a window of 3 of 5 steps, with draws that are always the same."""
    learned = [t.detach().clone().requires_grad_(True) for t in (images, logits)]
    syn_lr = torch.as_tensor(alpha, dtype=torch.float64).clone().requires_grad_(True)
    augment = Augment(16, DSA)

    def make_batch(synthetic, batch):
        images, logits = synthetic
        return augment(images, batch, logits.softmax(1))

    x, y = torch.randn(6, 3, 16, 16, generator=seeded(4)).double(), torch.arange(6) % CLASSES
    batches = utils.draw_batches(len(images), 3, 5, augment, seeded(5))
    start = 0.3 * torch.randn(student.num_params, generator=seeded(1)).double()
    unroll = engine(student, make_batch)
    # The window starts where it does whatever is learned, as it does for its gradient.
    fixed = [images.detach(), logits.detach()], torch.tensor(0.1, dtype=torch.float64)
    theta = unroll.advance(start, *fixed, batches[:2])
    loss = real_loss(student)
    return unroll(theta, lambda theta: loss(theta, x, y)[0], learned, syn_lr, batches[2:])


def learnable():
    images = torch.randn(6, 3, 16, 16, generator=seeded(2)).double()
    return images, torch.randn(6, CLASSES, generator=seeded(3)).double()


@pytest.mark.parametrize("engine", UNROLLS.values(), ids=UNROLLS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["images", "labels", "α"])
def test_gradients_of_the_real_loss_equal_finite_differences(engine, which, monkeypatch):
    student = make_student("sigmoid")  # which has no kinks to step over
    at = [*learnable(), torch.tensor(0.1, dtype=torch.float64)]
    # `advance` sees the same in all three.
    advance, start = engine.advance, []

    def once(self, *args):
        start[:] = start or [advance(self, *args)]
        return start[0]

    monkeypatch.setattr(engine, "advance", once)
    _, *gradients = iterate(engine, student, *at)
    direction = torch.randn(at[which].shape, generator=seeded(6)).double()
    values, step = [], 1e-5
    for sign in (1, -1):
        moved = list(at)
        moved[which] = at[which] + sign * step * direction
        values.append(iterate(engine, student, *moved)[0])
    numeric = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradients[which] * direction).sum(), numeric, rtol=1e-6, atol=0)
    assert numeric != 0


def test_both_engines_give_the_same_gradients_of_the_real_loss():
    student, at = make_student(), (*learnable(), 0.1)
    adjoint, autograd = (
        iterate(engine, student, *at) for engine in (AdjointUnroll, AutogradUnroll)
    )
    for ours, reference in zip(adjoint, autograd, strict=True):
        assert reference.any()
        assert (ours - reference).norm() <= 1e-9 * reference.norm()


@pytest.mark.parametrize("engine", UNROLLS.values(), ids=UNROLLS)
def test_steps_before_the_window_are_steps_of_sgd_and_keep_nothing(engine):
    student = make_student()
    images, _ = learnable()
    images.requires_grad_(True)
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) % CLASSES
    start = 0.3 * torch.randn(student.num_params, generator=seeded(1)).double()
    alive, most = weakref.WeakSet(), []

    def watched(function):
        def run(*tensors):
            (theta,) = function(*tensors)
            alive.add(theta)
            most.append(len(alive))
            return (theta,)

        return run

    unroll = engine(student, compile=watched)
    theta = unroll.advance(start, (images,), alpha, [(images, labels)] * 20)
    assert not theta.requires_grad and len(most) == 20
    assert max(most) <= 2  # θ_i and θ_{i+1}: memory does not grow with the steps

    expected = start.clone()
    for _ in range(20):
        expected.requires_grad_(True)
        loss = F.cross_entropy(student(images, expected), labels)
        expected = (expected - 0.1 * torch.autograd.grad(loss, expected)[0]).detach()
    torch.testing.assert_close(theta, expected, rtol=1e-9, atol=1e-12)
    assert unroll.advance(start, (images,), alpha, []) is start


def test_the_matching_loss_has_the_gradient_of_its_definition():
    start, target, theta = (torch.randn(9, generator=seeded(k)).double() for k in range(3))
    theta.requires_grad_(True)
    loss = matching_loss(start, target)(theta)
    (gradient,) = torch.autograd.grad(loss, theta)
    distance = ((start - target) ** 2).sum()
    torch.testing.assert_close(loss, ((theta - target) ** 2).sum() / distance)
    torch.testing.assert_close(gradient, 2 * (theta - target).detach() / distance)


# --------------------------------------------------------------------------------------------------
# What follows the gradients


def some_state(objective="loss", logits=None, **changes):
    rates = {"lr_img": 1.0, "lr_lr": 1e-3, "lr_teacher": 0.01}
    return make_state(arguments(objective=objective, **rates | changes), make_data(), logits)


def some_gradients(state, size):
    return {name: size * torch.ones_like(tensor) for name, tensor in state.learned.items()}


def some_step(gradients, loss=1.0):
    return Step(torch.tensor(loss), gradients, {}, "drawn")


def test_gradients_of_the_real_loss_are_cut_at_twice_their_running_norm():
    state = some_state()
    before = state.images.clone()
    state.step(some_step(some_gradients(state, 1e-3)))
    torch.testing.assert_close(state.images, before - 1e-3)  # the first is taken whole
    cut = state.clipped(some_gradients(state, 1.0))
    torch.testing.assert_close(cut["images"], torch.full_like(cut["images"], 2e-3))
    assert float(state.norms["alpha"]) == pytest.approx(0.9 * 1e-3 + 0.1 * 2e-3)
    small = some_gradients(state, 1e-4)
    torch.testing.assert_close(state.clipped(small), small)


def test_gradients_of_the_matching_loss_are_taken_whole_as_mtt_does():
    state = some_state("trajectory")
    before = state.images.clone()
    for size in (1e-3, 1.0):
        state.step(some_step(some_gradients(state, size)))
    expected = before - 1e-3 - (1.0 + 0.5 * 1e-3)  # momentum 0.5
    torch.testing.assert_close(state.images, expected)


def test_adam_moves_each_pixel_by_its_rate():
    state = some_state(optimizer_img="adam", lr_img=0.01)
    before = state.images.clone()
    state.step(some_step(some_gradients(state, 7.0)))
    torch.testing.assert_close(before - state.images, torch.full_like(before, 0.01))


def test_labels_start_as_the_experts_see_them_and_are_learned_where_they_are_to_be():
    student = make_student()
    thetas = [torch.randn(student.num_params, generator=seeded(k)).double() for k in range(4)]
    parts = [[p.view(s) for p, s in zip(t.split(student.sizes), student.shapes)] for t in thetas]
    experts = Experts([Expert(epochs, "expert", None) for epochs in (parts[:2], parts[2:])])
    state = some_state()
    images = state.images.double()
    for epoch, asked in ((0, thetas[::2]), (1, thetas[1::2]), (None, thetas[1::2])):
        logits = experts.logits(student, images, epoch)
        expected = sum(student(images, theta) for theta in asked) / 2
        torch.testing.assert_close(logits, expected)

    fixed = some_state(labels="soft", logits=logits.float())
    assert fixed.learned.keys() == {"images", "alpha"}
    torch.testing.assert_close(fixed.labels, expected.softmax(1).float())
    learning = some_state(labels="learned", lr_labels=0.5, logits=logits.float())
    assert list(learning.learned) == ["images", "labels", "alpha"]
    assert not learning.labels.requires_grad
    gradients = some_gradients(learning, 0.0)
    gradients["labels"] += 1e-3
    learning.step(some_step(gradients))
    learned = learning.learned["labels"].detach()
    torch.testing.assert_close(learned, logits.float() - 0.5e-3)


# --------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("which", [0, 1], ids=["unroll", "advance"])
def test_an_engine_that_fails_compiled_is_called_once_more(monkeypatch, which):
    """Its derivatives, too, which `Compiler.function` does not see fail."""
    calls = []

    class Engine:
        def __init__(self, *_, **__):
            pass

        def __call__(self, *_):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("Triton failed")
            return "done"

        advance = __call__

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(FAILURES, "seen", False)
    monkeypatch.setitem(UNROLLS, "adjoint", Engine)
    machine = Machine(torch.device("cpu"), ALONE, Compiler())
    inputs = SimpleNamespace(data=make_data(), student=None, machine=machine)
    args = arguments(unroll_memory=0.0)
    function = segments.make_unroll(args, inputs, None)[which]
    with pytest.warns(UserWarning, match="failed, continuing without it: Triton failed"):
        assert function() == "done"


LOSS = ["--objective=loss", "--optimizer_img=adam", "--batch_objective=16"]
LOSS += ["--expert_epochs=3", "--max_start_epoch=25"]  # the defaults: it follows no experts


def run_flags(specks_run):
    """Those of a run of two iterations."""
    return [*specks_run, "--Iteration=2", "--eval_it=2"]


def test_a_run_on_the_real_loss_needs_no_experts_and_says_what_its_loss_is(
    run_here, specks_run, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(report, "plot_loss", lambda axis, curves: drawn.append(curves.loss_title))
    logged = []
    monkeypatch.setattr(
        wandb_page.Dashboard, "log", lambda self, values, step: logged.append(values)
    )
    flags = [*run_flags(specks_run), *LOSS, "--total_steps=5", f"--buffer_path={tmp_path}"]
    done = run_here("distillation.py", *flags, "--run_name=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "experts: 0" in done.stdout
    losses = [values["Real_Loss"] for values in logged if "Real_Loss" in values]
    starts = [values["Window_Start"] for values in logged if "Window_Start" in values]
    assert len(losses) == len(starts) == 2 and np.isfinite(losses).all()
    assert not any("Grand_Loss" in values for values in logged)
    assert set(drawn) == {"loss on real images"}


@pytest.mark.parametrize("kind", ["soft", "learned"])
def test_soft_labels_are_saved_evaluated_and_exported(run_here, specks_run, tmp_path, kind):
    flags = [*run_flags(specks_run), f"--labels={kind}", "--run_name=mine", "--ipc=3"]
    done = run_here("distillation.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("logged_files/*/mine")
    first, last = (torch.load(folder / f"labels_{it}.pt", weights_only=True) for it in (0, 2))
    assert first.dtype == torch.float32 and first.dim() == 2
    torch.testing.assert_close(first.sum(1), torch.ones(len(first)))
    assert torch.equal(first, last) == (kind == "soft")

    # Another objective goes on from the images with their labels, and needs no experts.
    on = [f"--pix_init={folder}", f"--buffer_path={tmp_path}", "--run_name=on", *LOSS]
    done = run_here("distillation.py", *flags, *on, "--Iteration=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "experts: 0" in done.stdout

    # The labels of another epoch are others, even for images that have labels.
    again = [f"--pix_init={folder}", "--label_epoch=1", "--run_name=again", "--Iteration=0"]
    done = run_here("distillation.py", *flags, *again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (other,) = tmp_path.glob("logged_files/*/again/labels_0.pt")
    assert not torch.allclose(torch.load(other, weights_only=True), last)

    evaluate = [flag for flag in specks_run if not flag.startswith(("--run_name", "--log_dir"))]
    evaluate += [f"--evaluate={folder / 'images_2.pt'}"]
    done = run_here("distillation.py", *evaluate, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_here("distillation.py", *evaluate, "--export=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exported = torch.load(tmp_path / "out" / "dd_ranking.pt", weights_only=True)
    assert torch.equal(exported["soft_labels"], last)
    classes = torch.arange(2).repeat_interleave(3)  # which labels that are learned may leave
    assert torch.equal(exported["hard_labels"], classes)
    assert len(list(tmp_path.glob("out/images/*/*.png"))) == 6
