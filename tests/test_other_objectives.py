"""DC, DSA, DM, CAFE and KIP: reference values, gradients, what they draw, and their commands."""

import math

import pytest
import torch
from conftest import arguments, make_state
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import kernels
import utils
from datasets.preprocessing import Data, Form
from networks import LastFeatures
from objectives import OBJECTIVES, gradients
from objectives.classwise import NO_TRAINING, Classwise, Loops, Networks, loops_of
from objectives.features import (
    AlignFeatures,
    AllFeatures,
    MatchDistributions,
    class_means,
    mean_and_last,
    mean_features,
)
from objectives.gradients import MatchGradients, class_gradient, gradient_distance
from objectives.kernel import KernelRidge, kip_loss
from objectives.pairs import Pairs
from reparam_module import AdjointUnroll, ReparamModule
from run.rules import LABELS, probabilities_of
from run.state import Step
from system.ranks import ALONE, Ranks
from utils import Augment

NEW = [name for name in OBJECTIVES if not OBJECTIVES[name].learns_alpha]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class SomeViews:
    """Images without augmentation, real ones (classes, B, ...) and synthetic (classes, n, ...)."""

    def __init__(self, real, syn):
        self.of_real = real
        self.image_syn = syn.clone().requires_grad_(True)
        self.labels = range(len(real))

    def real(self, label):
        return self.of_real[label], torch.full((len(self.of_real[label]),), label)

    def syn(self, label):
        images = self.image_syn[label]
        return images, torch.full((len(images),), label)


def goals(student):
    """Each objective's loss and gradient on a student, by name."""
    last, every = (
        ReparamModule(features(student.network)) for features in (LastFeatures, AllFeatures)
    )
    named = {
        f"gradient_{name}": MatchGradients(
            class_gradient(student), gradient_distance(student, getattr(gradients, name))
        )
        for name in ("ours", "mse", "cos")
    }
    named["distribution"] = MatchDistributions(mean_features(last), class_means(last))
    named["features"] = AlignFeatures(mean_and_last(every), class_means(every))
    return named


NAMES = ["gradient_ours", "gradient_mse", "gradient_cos", "distribution", "features"]


def student_of(model, form):
    network = utils.initial_network(model, form, utils.make_generator(1), "cpu").double()
    return ReparamModule(network)


def close(ours, reference):
    assert reference.any()
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9 * reference.abs().max().item())


# --------------------------------------------------------------------------------------------------
# Reference values of the authors' own code


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_papers_own_code(golden, name):
    values = golden("objectives")
    student = student_of("ConvNetW32", Form(10, 16))
    theta = 0.05 * torch.arange(student.num_params).double().sin()
    views = SomeViews(values["real"].double(), values["syn"].double())
    loss, gradient = goals(student)[name](theta, views, views.labels)
    close(loss, values[f"{name}_loss"])
    close(gradient, values[f"{name}_grad"])


def test_the_kernels_and_the_loss_of_kip_are_those_of_neural_tangents(golden):
    values = golden("objectives")
    x_syn, x_real = (values[f"kip_{name}"].double() for name in ("xs", "xt"))
    x_syn.requires_grad_(True)
    one_hot = torch.eye(10).double()
    y_syn, y_real = (kernels.centred_targets(one_hot[torch.arange(n) % 10], 10) for n in (20, 30))
    y_syn.requires_grad_(True)
    close(kernels.ntk(x_syn, x_syn), values["kip_ntk_ss"])
    nngp, ntk = kernels.wide_kernels(x_real, x_syn)
    close(ntk, values["kip_ntk_ts"])
    close(nngp, values["kip_nngp_ts"])
    loss = kip_loss(x_syn, y_syn, x_real, y_real)
    close(loss, values["kip_loss"])
    for gradient, name in zip(torch.autograd.grad(loss, (x_syn, y_syn)), ("xs", "ys")):
        torch.testing.assert_close(gradient, values[f"kip_grad_{name}"], rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Gradients on other networks and shapes, beside plain autograd


def plain_gradients(network, x, y, create_graph=False):
    loss = F.cross_entropy(network(x), y)
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)


def plain_distance(network, views, label):
    """DC's, as its equation says it."""
    real = plain_gradients(network, *views.real(label))
    syn = plain_gradients(network, *views.syn(label), create_graph=True)
    total = 0
    for g, h in zip(real, syn):
        if g.dim() > 1:
            inner = torch.einsum("ij,ij->i", g.flatten(1), h.flatten(1))
            g_norm, h_norm = (torch.linalg.vector_norm(z.flatten(1), dim=1) for z in (g, h))
            total = total + len(g) - (inner / (g_norm * h_norm + 1e-6)).sum()
    return total


def plain_features(network, x):
    """The features after each activation that F.relu or a module computes, and the last."""
    *_, last = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
    found = []
    hooks = [last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))]
    kinds = (torch.nn.ReLU, torch.nn.Sigmoid, torch.nn.LeakyReLU)
    for module in network.modules():
        if isinstance(module, kinds):
            hooks.append(module.register_forward_hook(lambda _, __, result: found.append(result)))
    network(x)
    for hook in hooks:
        hook.remove()
    return found


def plain_loss(name, network, views):
    if name == "gradient_ours":
        return sum(plain_distance(network, views, label) for label in views.labels)
    real = [plain_features(network, views.real(label)[0]) for label in views.labels]
    syn = [plain_features(network, views.syn(label)[0]) for label in views.labels]
    pairs = [[(r.mean(0) - s.mean(0)).square().sum() for r, s in zip(*of)] for of in zip(real, syn)]
    if name == "distribution":
        return sum(of_class[-1] for of_class in pairs)
    total = 0
    centres = torch.stack([of_class[-1].mean(0) for of_class in syn])
    for label, (*_, late, last) in enumerate(pairs):
        # The last activation's is not φ where a pooling follows it, so φ's own follows, twice.
        total = total + sum(0.1 * part for part in pairs[label][:-2]) + late + 2 * last
        inner = real[label][-1] @ centres.T
        y = torch.full((len(inner),), label)
        total = total + 0.01 * F.cross_entropy(inner, y, reduction="sum")
    return total


SHAPES = [  # network, channels, side, classes, real images, synthetic ones
    ("ConvNetD1", 1, 8, 2, 5, 1),
    ("ConvNetD2", 2, 8, 3, 20, 2),
    ("ConvNetNN", 4, 8, 2, 3, 3),
    ("ConvNetLN", 5, 8, 2, 17, 1),
    ("ConvNetMP", 3, 8, 4, 2, 2),
    ("ConvNetNP", 3, 8, 2, 3, 1),
    ("ConvNetAS", 3, 8, 2, 3, 1),
    ("ConvNetAL", 3, 8, 2, 3, 1),
    ("MLP", 5, 8, 3, 4, 2),
    ("ResNet18", 2, 32, 2, 1, 1),
]


@pytest.mark.parametrize("name", ["gradient_ours", "distribution", "features"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def test_gradients_are_those_of_plain_autograd(name, shape):
    model, channels, side, classes, of_real, of_syn = shape
    if name == "features" and model in ("MLP", "ResNet18"):
        pytest.skip("whose activations are no modules")
    student = student_of(model, Form(classes, side, channels))
    theta = parameters_to_vector(student.network.parameters()).detach()
    images = (
        torch.randn(classes, count, channels, side, side, generator=seeded(seed)).double()
        for seed, count in enumerate((of_real, of_syn))
    )
    views = SomeViews(*images)
    loss, gradient = goals(student)[name](theta, views, views.labels)
    reference = plain_loss(name, student.network, views)
    close(loss, reference.detach())
    close(gradient, torch.autograd.grad(reference, views.image_syn)[0])


@pytest.mark.parametrize("model", ["MLP", "ResNet18", "VGG16", "ConvNetD2"])
def test_the_last_features_are_what_the_last_layer_takes(model):
    form = Form(3, 32, 2)
    student = student_of(model, form)
    x = torch.randn(2, 2, 32, 32, generator=seeded(0)).double()
    layers = student.network.layers(x)
    *_, last = (m for m in student.network.modules() if isinstance(m, torch.nn.Linear))
    torch.testing.assert_close(last(layers[-1].flatten(1)), student.network(x))
    assert len(layers) >= 3


@pytest.mark.parametrize("seed, size", [(0, 3), (1, 48), (2, 300)])
def test_the_gradient_of_kip_is_that_of_its_equation(seed, size):
    """Beside finite differences."""
    random = seeded(seed)
    x_syn, x_real = (torch.randn(n, size, generator=random).double() for n in (6, 9))
    y_syn, y_real = (torch.randn(n, 4, generator=seeded(n)).double() for n in (6, 9))
    learned = [x_syn.requires_grad_(True), y_syn.requires_grad_(True)]
    analytic = torch.autograd.grad(kip_loss(*learned, x_real, y_real), learned)
    for which in (0, 1):
        direction = torch.randn(learned[which].shape, generator=seeded(7)).double()
        values = []
        for sign in (1, -1):
            moved = [tensor.detach() for tensor in learned]
            moved[which] = moved[which] + sign * 1e-6 * direction
            values.append(kip_loss(*moved, x_real, y_real))
        numeric = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((analytic[which] * direction).sum(), numeric, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_kernels_are_finite_for_an_image_and_itself(dtype):
    x = torch.randn(4, 12, generator=seeded(0)).to(dtype).requires_grad_(True)
    kernel = kernels.ntk(x, torch.cat([x.detach(), 2 * x.detach(), -x.detach()]))
    (gradient,) = torch.autograd.grad(kernel.sum(), x)
    assert kernel.isfinite().all() and gradient.isfinite().all() and gradient.any()
    itself = kernels.ntk(x, x)
    torch.testing.assert_close(itself, itself.T)


# --------------------------------------------------------------------------------------------------
# What an iteration draws, and what it carries to the next

CLASSES = 4


def make_data(channels=3, count=24):
    images = torch.randn(count, channels, 8, 8, generator=seeded(0))
    part = images, torch.arange(count) % CLASSES
    settings = {"mean": [0.0] * channels, "std": [1.0] * channels}
    return Data(part, part, part, tuple("abcd"), settings, None)


def make_classwise(goal, data, ranks=ALONE, loops=NO_TRAINING, **changes):
    augment = changes.pop("augment", Augment(8))
    student = ReparamModule(utils.initial_network("MLP", data.form, utils.make_generator(0), "cpu"))
    members = [torch.nonzero(data.train[1] == label).flatten() for label in range(CLASSES)]

    def make_batch(synthetic, batch):
        return augment(*synthetic, batch, torch.arange(CLASSES))

    networks = Networks(
        model="MLP",
        form=data.form,
        loops=loops,
        advance=AdjointUnroll(student, make_batch).advance,
        augment=augment,
        batch=3,
        seed=0,
    )
    settings = {"count": 1, "seed": 0} | changes
    goal = goal or goals(student)["gradient_ours"]
    pairs = Pairs(data, members, 5, augment)
    return Classwise(goal=goal, networks=networks, pairs=pairs, ranks=ranks, **settings)


def dm_state(data, **changes):
    return make_state(arguments(objective="dm", **changes), data)


def test_a_match_sees_real_and_synthetic_images_of_a_class_under_the_same_augmentation():
    data = make_data()
    seen = []

    def goal(theta, views, own):
        for label in own:
            draw = views.draws[label]
            seen.append(draw.syn.group)
            assert draw.real.group == draw.syn.group and len(draw.real.indices) == 5
            assert (data.train[1][draw.real.indices] == label).all()
            assert draw.syn.indices.tolist() == [label]
            for of_real, of_syn in zip(draw.real.parameters, draw.syn.parameters):
                assert torch.equal(of_real, of_syn[:1].expand_as(of_real))
        return torch.zeros(()), torch.zeros_like(views.image_syn)

    augment = Augment(8, utils.augment_groups(True, utils.DSA_STRATEGY))
    classwise = make_classwise(goal, data, augment=augment)
    for it in range(5):
        classwise(dm_state(data), it)
    assert len(seen) == 5 * CLASSES and len(set(seen)) > 2


def test_an_iteration_follows_from_the_seed_and_its_number():
    data = make_data(channels=2)
    first, again = (make_classwise(None, data)(dm_state(data), 3) for _ in range(2))
    other = make_classwise(None, data)(dm_state(data), 4)
    assert torch.equal(first.gradients["images"], again.gradients["images"])
    assert not torch.equal(first.gradients["images"], other.gradients["images"])


def test_segments_are_a_mean_over_networks():
    data = make_data()
    state = dm_state(data)
    both = make_classwise(None, data, count=2)(state, 1)
    gradients = []
    for number in (0, 1):
        classwise = make_classwise(None, data)
        theta = classwise.networks.parameters(state, 1, number)
        random = utils.make_generator("match", 0, 1, number)
        views = classwise.pairs.draw(state, random)
        gradients.append(classwise.goal(theta, views, range(CLASSES))[1])
    torch.testing.assert_close(both.gradients["images"], sum(gradients) / 2)


class OneOf(Ranks):
    """A rank whose means take the others' part as zero."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def mean(self, tensors):
        return [tensor / self.size for tensor in tensors]


@pytest.mark.parametrize("name", ["gradient_ours", "distribution", "features"])
def test_ranks_share_out_the_classes(name):
    data = make_data()
    student = ReparamModule(utils.initial_network("MLP", data.form, utils.make_generator(0), "cpu"))
    goal = goals(student)[name]
    alone = make_classwise(goal, data)(dm_state(data), 2)
    shares = [
        make_classwise(goal, data, ranks=OneOf(rank, 3))(dm_state(data), 2) for rank in range(3)
    ]
    total = sum(step.gradients["images"] for step in shares)
    torch.testing.assert_close(total, alone.gradients["images"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(step.loss for step in shares), alone.loss)


def test_a_network_is_trained_between_its_matches_and_then_a_fresh_one_comes():
    data = make_data()
    state = dm_state(data)
    classwise = make_classwise(None, data, loops=Loops(2, 3))
    thetas = []
    for it in range(3):
        step = classwise(state, it)
        state.step(step)
        thetas.append(step.carried["theta"][0])
        assert step.log == {"Match": it % 2}
    fresh = make_classwise(None, data).networks.parameters(state, 0, 0)
    assert torch.equal(thetas[0], fresh)
    assert not torch.equal(thetas[0], thetas[2])

    # Three epochs of two batches each, by hand.
    assert 0 < (thetas[1] - thetas[0]).norm() < 1
    student = student_of("MLP", data.form)
    start, end = (
        F.cross_entropy(student(state.images.double(), theta.double()), state.label_syn)
        for theta in thetas[:2]
    )
    assert end < start


def test_loops_are_those_of_dc():
    papers = {1: (1, 1), 10: (10, 50), 20: (20, 25), 50: (50, 10)}
    assert {ipc: tuple(loops_of(ipc)) for ipc in papers} == papers
    assert loops_of(5) == (1, 1) and loops_of(100) == (50, 10)


def test_kip_takes_a_batch_of_which_each_rank_has_a_part():
    data = make_data(channels=5)
    state = make_state(arguments(objective="kip"), data)
    alone = KernelRidge(data, 16, 1, 0, ALONE)(state, 2)
    assert list(alone.gradients) == ["images", "labels"]
    shares = [KernelRidge(data, 16, 1, 0, OneOf(rank, 2))(state, 2) for rank in range(2)]
    for name, gradient in alone.gradients.items():
        total = sum(step.gradients[name] for step in shares)
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-7)
    fixed = make_state(arguments(objective="kip", labels="hard"), data)
    step = KernelRidge(data, 16, 1, 0, ALONE)(fixed, 2)
    torch.testing.assert_close(step.loss, alone.loss)
    assert list(step.gradients) == ["images"]


# --------------------------------------------------------------------------------------------------
# The state without a learned α, and with targets


def test_a_state_without_alpha_keeps_the_one_that_it_started_with(tmp_path):
    data = make_data()
    state = dm_state(data, lr_teacher=0.02, ema=0.5)
    assert list(state.learned) == ["images"] and state.alpha == pytest.approx(0.02)
    step = Step(torch.tensor(1.0), {"images": torch.ones_like(state.images)}, {}, "drawn")
    before = state.images.clone()
    assert state.step(step) is None
    torch.testing.assert_close(state.learned["images"].detach(), before - 1)  # rate 1 of DM
    assert state.alpha == state.current_alpha == pytest.approx(0.02)
    state.step(step._replace(carried={"theta": torch.ones(1, 3)}))
    state.save(tmp_path / "checkpoint.pt")
    other = dm_state(data, lr_teacher=0.02, ema=0.5)
    other.load(tmp_path / "checkpoint.pt")
    assert torch.equal(other.carried["theta"], torch.ones(1, 3))
    assert torch.equal(other.images, state.images) and other.losses == [1.0, 1.0]
    fault = state.step(step._replace(loss=torch.tensor(math.nan)))
    assert fault.startswith("loss is not finite. Lower --lr_img")


def test_the_rate_of_cafe_is_halved_once():
    state = make_state(arguments(objective="cafe"), make_data())
    (at,) = state.rules.halvings
    state.losses = [1.0] * (at - 2)
    step = Step(torch.tensor(1.0), {"images": torch.zeros_like(state.images)}, {}, "drawn")
    rates = []
    for _ in range(4):
        state.step(step)
        rates.append(state.optimizers["images"].param_groups[0]["lr"])
    assert rates == [0.1, 0.05, 0.05, 0.05]


def test_targets_start_as_classes_and_networks_take_their_probabilities_of():
    state = make_state(arguments(objective="kip", ipc=2), make_data())
    one_hot = F.one_hot(state.label_syn, CLASSES).float()
    torch.testing.assert_close(state.targets, one_hot - 1 / CLASSES)
    torch.testing.assert_close(state.labels, one_hot)
    probabilities = torch.rand(5, CLASSES, generator=seeded(0)).softmax(1)
    again = probabilities_of(kernels.centred_targets(probabilities, CLASSES))
    torch.testing.assert_close(again, probabilities)
    wild = probabilities_of(torch.tensor([[2.0, -1.0, 0.25, -0.25]]))
    torch.testing.assert_close(wild, torch.tensor([[2.25, 0.0, 0.5, 0.0]]) / 2.75)


# --------------------------------------------------------------------------------------------------
# Commands


def flags_of(objective, specks_flags):
    """Those of a run of four iterations."""
    flags = [*specks_flags, f"--objective={objective}", "--run_name=run", "--lr_teacher=0.1"]
    flags += ["--eval_it=4", "--num_eval=1", "--epoch_eval_train=2", "--batch_real=8"]
    return [*flags, "--eval_mode=K", "--Iteration=4"]


IPC = {"dc": 10, "kip": 3}  # with ten images, a network is carried from match to match


@pytest.mark.parametrize("objective", NEW)
def test_a_resumed_run_gives_the_same_set_bit_for_bit(finish, specks_flags, tmp_path, objective):
    flags = [*flags_of(objective, specks_flags), f"--ipc={IPC.get(objective, 1)}", "--ema=0.5"]
    flags += ["--model=MLP", "--batch_train=20"]
    for name, stops in (("straight", [4]), ("resumed", [2, 4])):
        folder = tmp_path / name
        folder.mkdir()
        for stop in stops:
            until = f"--Iteration={stop}"
            out = finish("distillation.py", *flags, until, cwd=folder, curves=False)
    assert "α is not learned: evaluation trains with --lr_teacher=0.1" in out
    assert "experts: 0" in out and "NTK" in out
    contents = [
        torch.load(
            tmp_path / name / "logged_files/ImageFolder/run/checkpoint.pt", weights_only=True
        )
        for name in ("straight", "resumed")
    ]
    for key in ("learned", "average"):
        for name, tensor in contents[0][key].items():
            assert torch.equal(tensor, contents[1][key][name])
    assert contents[0]["losses"] == contents[1]["losses"]
    assert all(math.isfinite(loss) for loss in contents[0]["losses"])
    carried = [content["carried"] for content in contents]
    assert (carried[0] is None) == (objective != "dc")
    if objective == "dc":
        assert torch.equal(carried[0]["theta"], carried[1]["theta"])


def test_a_set_of_kip_is_one_for_kernel_machines_and_for_networks(run_here, specks_flags, tmp_path):
    flags = [*flags_of("kip", specks_flags), "--ipc=2", "--factor=2"]
    done = run_here("distillation.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("logged_files/*/run")
    targets, labels = (
        torch.load(folder / f"{name}_4.pt", weights_only=True) for name in ("targets", "labels")
    )
    assert targets.shape == labels.shape == (16, 2)
    assert (labels >= 0).all() and not torch.allclose(targets + 0.5, labels)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))

    # What is evaluated afterwards is what the run has reported.
    line = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["4", "NTK"])
    evaluate = [*specks_flags, f"--evaluate={folder / 'images_4.pt'}"]
    done = run_here("distillation.py", *evaluate, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (again,) = (row for row in done.stdout.splitlines() if row.startswith("NTK"))
    assert again.split()[1:] == line.split()[2:4]
    search = [*evaluate, "--search_alpha", "--epoch_eval_train=1"]
    done = run_here("distillation.py", *search, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_here("distillation.py", *evaluate, "--export=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    for what in (["--evaluate=out"], [f"--evaluate={folder / 'images_4.pt'}", "--task=transfer"]):
        more = ["--eval_mode=NTK", "--log_dir=logs"]
        done = run_here("distillation.py", *specks_flags, *what, *more, cwd=tmp_path)
        rows = [row.split() for row in done.stdout.splitlines() if row.startswith("NTK")]
        assert line.split()[3] in rows[-1], done.stderr

    again = [f"--pix_init={folder / 'images_4.pt'}", "--run_name=again", "--Iteration=0"]
    done = run_here("distillation.py", *flags, *again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (other,) = tmp_path.glob("logged_files/*/again/targets_0.pt")
    assert torch.equal(torch.load(other, weights_only=True), targets)


REFUSED = [
    ("dm", "--texture", ["--texture=True", "--objective=dm", "leave it out"]),
    ("dc", "--syn_steps=30", ["--syn_steps=30", "--objective=dc", "leave it out"]),
    ("dsa", "--batch_syn=2", ["--batch_syn=2", "--objective=dsa"]),
    ("cafe", "--optimizer_lr=log_adam", ["--optimizer_lr=log_adam", "--objective=cafe"]),
    ("kip", "--segments=2", ["--segments=2", "--objective=kip"]),
    ("kip", "--no_aug", ["--no_aug=True", "--objective=kip"]),
    ("dm", "--labels=soft", ["--labels=soft", "--objective=dm", "hard"]),
    ("kip", "--labels=learned", ["--labels=learned", "--objective=kip", "targets or hard"]),
    ("trajectory", "--labels=targets", ["--labels=targets", "hard or soft or learned"]),
    ("dsa", "--model=ConvNetBN", ["--model=ConvNetBN", "batch normalisation", "instance"]),
    ("loss", "--eval_mode=K --texture", ["--eval_mode=K", "--texture", "leave one out"]),
]


@pytest.mark.parametrize("objective, flags, parts", REFUSED)
def test_what_has_no_meaning_is_refused_at_the_start(
    run_here, specks_flags, tmp_path, objective, flags, parts
):
    given = [*specks_flags, f"--objective={objective}", *flags.split()]
    done = run_here("distillation.py", *given, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in parts), done.stderr
    assert not list(tmp_path.iterdir())


def test_defaults_are_those_of_the_papers():
    rates = {"dc": 0.1, "dsa": 0.1, "dm": 1.0, "cafe": 0.1, "kip": 0.04, "trajectory": 1000.0}
    assert {name: arguments(objective=name).lr_img for name in rates} == rates
    assert [name for name in OBJECTIVES if arguments(objective=name).no_aug] == ["dc"]
    kip = arguments(objective="kip")
    assert (kip.optimizer_img, kip.labels, kip.lr_labels) == ("adam", "targets", 0.04)
    assert arguments(objective="dm", optimizer_img="adam").lr_img == 0.01
    assert LABELS["targets"].learned and not LABELS["targets"].soft
