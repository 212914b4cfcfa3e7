"""Fresh networks trained and tested on a set of images, coresets, and the scores of a run."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import load_data

import evaluation
import training
import utils
from cli.distillation_flags import eval_mode
from datasets import coresets
from datasets.preprocessing import Form, Layout
from evaluation import EVAL_POOLS, Evaluator, Plan, Trainee, make_pool
from networks import ConvNet
from reparam_module import ReparamModule
from run.scores import Evaluations, Scores, from_json, to_json
from system import process, threads
from system.compilation import FAILURES, Compiler
from system.machine import Machine
from system.process import ReportedError
from system.ranks import ALONE
from utils import Augment

MODEL = "ConvNetD1"
DSA = utils.augment_groups(True, utils.DSA_STRATEGY)
PLAIN = Compiler(compile=False)
MACHINE = Machine(torch.device("cpu"), ALONE, PLAIN)
CPU = torch.device("cpu")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------
# The evaluator


@pytest.fixture(scope="module")
def data(tiny_folder):
    """Ten classes of 16×16 pixels: 30 training, 20 validation and 10 test images."""
    return load_data("ImageFolder", tiny_folder, False, 0.5, CPU, im_size=16)


@pytest.fixture
def evaluator(data):
    pool = {"MLP": None, MODEL: None}
    return Evaluator(
        data, pool, 2, 3, batch_train=4, batch_real=8, augment=Augment(16, DSA), compiler=PLAIN
    )


def test_each_eval_mode_stands_for_its_networks():
    pools = {mode: list(make_pool(mode, "MLP", Form(10, 32), MACHINE)) for mode in EVAL_POOLS}
    assert pools == {
        "S": ["MLP"],
        "A": ["ConvNet", "MLP", "ResNet18"],
        "R": ["MLP", "ResNet18"],
        "M": ["MLP"],
        "C": ["MLP", "ConvNet"],
        "K": ["MLP", "NTK"],
        "W": ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
        "D": ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"],
        "P": ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
        "T": ["ConvNetW32", "ConvNet", "ConvNetD4", "ResNet18", "VGG11", "MLP"],
        "N": ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
    }


def test_networks_may_be_named_themselves():
    mode = eval_mode("VGG11, ResNet,NTK,VGG11")
    assert list(make_pool(mode, "MLP", Form(10, 32), MACHINE)) == ["VGG11", "ResNet18", "NTK"]


def test_on_a_cpu_networks_are_trained_one_after_the_other():
    assert not any(make_pool("N", "MLP", Form(10, 16), MACHINE).values())


def test_scores_have_an_accuracy_per_network_and_the_test_accuracy_of_each_class(evaluator, data):
    images, labels = data.train
    scores = evaluator(images, labels, 0.01, (0, "key"))
    assert list(scores) == ["MLP", MODEL]
    for of_name in scores.values():
        assert len(of_name.val) == len(of_name.test) == len(of_name.classes) == 2
        for total, classes in zip(of_name.test, of_name.classes):  # one test image of each class
            assert set(classes) <= {0, 1} and sum(classes) / 10 == pytest.approx(total)


def test_scores_follow_their_key(evaluator, data):
    images, labels = data.train
    scores, again, other = (evaluator(images, labels, 0.01, (0, key)) for key in "aab")
    assert scores == again != other


def test_each_network_may_have_images_of_its_own(evaluator, data):
    images, labels = evaluation.random_real_sets(data, Layout(1), 2, seed=0)
    assert images.shape == (2, 10, 3, 16, 16) and not torch.equal(*images)
    scores = evaluator(images, labels, 0.01, (0, "key"))
    of_first = evaluator(images[0], labels[0], 0.01, (0, "key"))
    assert scores["MLP"].val[0] == of_first["MLP"].val[0]
    assert scores != of_first


def test_random_real_images_are_of_their_class_and_follow_their_seed(data):
    images, labels = evaluation.random_real_sets(data, Layout(2), 3, seed=0)
    classes = [label for label in range(10) for _ in range(2)]
    assert labels.tolist() == [classes] * 3
    of_train = {image.numpy().tobytes(): int(label) for image, label in zip(*data.train)}
    for one in images:
        assert [of_train[image.numpy().tobytes()] for image in one] == classes
        assert len(one.unique(dim=0)) == 20
    again, other = (evaluation.random_real_sets(data, Layout(2), 3, seed)[0] for seed in (0, 1))
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_herding_chooses_rows_whose_mean_is_close_to_the_mean_of_all():
    features = torch.tensor([[0.0], [1.0], [4.5], [3.1], [7.0], [8.4]])  # their mean is 4
    # 4.5, then 3.1 for a mean of 3.8; a third one near 4.4 would be best.
    assert coresets.herding(features, 2) == [2, 3]
    features = torch.randn(200, 8, generator=seeded(0))
    chosen = coresets.herding(features, 20)
    assert len(set(chosen)) == 20
    mean = features.mean(0)
    assert (features[chosen].mean(0) - mean).norm() < 0.2 * (features[:20].mean(0) - mean).norm()


def test_k_center_leaves_no_row_far_from_those_it_chooses():
    features = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0], [-5.0]])  # their mean is 2.83
    assert coresets.k_center(features, 3) == [2, 4, 5]


def test_k_center_takes_no_row_twice():
    assert sorted(coresets.k_center(torch.tensor([[0.0], [0.0], [0.0], [1.0]]), 4)) == [0, 1, 2, 3]


def test_a_coreset_has_its_images_from_each_class_and_features_of_its_class_alone(data):
    seen = []

    def features(images):
        seen.append(images)
        return images.flatten(1)

    images, labels = coresets.coreset(data, 2, coresets.k_center, features)
    of_train = {image.numpy().tobytes(): int(label) for image, label in zip(*data.train)}
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert [of_train[image.numpy().tobytes()] for image in images] == labels.tolist()
    for label, part in enumerate(seen):
        assert torch.equal(part, data.train[0][data.train[1] == label])


def small_networks():
    torch.manual_seed(0)
    return [ConvNet(3, 7, 16, width=4).double() for _ in range(3)]


def test_networks_trained_together_end_as_those_trained_one_after_the_other(evaluator):
    images = torch.randn(3, 7, 3, 16, 16, generator=seeded(0), dtype=torch.float64)
    labels = torch.arange(7)
    alone, together, initial = (small_networks() for _ in range(3))
    plans = [Plan(x, labels, alpha, ()) for x, alpha in zip(images, (0.01, 0.02, 0.04))]
    for number, each in enumerate(zip(plans, alone)):
        list(evaluator.evaluate_synset(Trainee(*each, each[1], seeded(number))))
    step = partial(training.sgd_step, ReparamModule(together[0]))
    each = enumerate(zip(plans, together))
    evaluator.train_together(step, [Trainee(*pair, None, seeded(k)) for k, pair in each])
    for networks in zip(alone, together, initial):
        for p, q, start in zip(*(network.parameters() for network in networks)):
            assert not torch.equal(p, start)
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, whose effect ends with the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_network_ends_the_same_bit_for_bit_on_any_number_of_threads(evaluator, data, set_threads):
    images, labels = data.train
    scores = []
    for number in (1, 2, 4):
        set_threads(number)
        scores.append(evaluator(images[:20], labels[:20], 0.01, (0, "key"))[MODEL])
        assert torch.get_num_threads() == number
    assert scores[0] == scores[1] == scores[2]
    single = replace(evaluator, num_eval=1)(images[:20], labels[:20], 0.01, (0, "key"))[MODEL]
    assert single.test == scores[0].test[:1] and single.classes == scores[0].classes[:1]


def test_each_alpha_is_tried_as_by_a_single_network(evaluator, data, set_threads, capsys):
    set_threads(3)
    images, labels = data.train
    train = images[:20], labels[:20]
    best = evaluation.search_alphas(evaluator, *train, (0,))
    shown = capsys.readouterr().out
    single = replace(evaluator, num_eval=1)
    for name in evaluator.pool:
        reached = []
        for alpha in evaluation.ALPHAS:
            reached += single(*train, alpha, (0, "search"))[name].val
            assert f"{name:12} α = {alpha:<7g} {reached[-1]:7.2%}" in shown
        assert best[name] == evaluation.ALPHAS[reached.index(max(reached))]
        assert len(set(reached)) > 1


@pytest.mark.parametrize("number", [1, 2])
def test_iterators_in_threads_take_turns_and_what_one_raises_ends_all(set_threads, number):
    set_threads(number)
    bar = process.progress(total=300)
    order = []

    def count(name, last):
        for _ in range(last):
            order.append(name)
            yield
        if name == "faulty":
            raise ReportedError("at its end")

    threads.in_threads([count(k, 60) for k in range(3)], True, bar)
    assert [order.count(k) for k in range(3)] == [60] * 3
    if number == 1:
        assert order == [k for _ in range(3) for k in range(3) for _ in range(20)]
    with pytest.raises(ReportedError, match="at its end"):
        threads.in_threads([count("endless", 10**9), count("faulty", 25)], True, bar)
    assert torch.get_num_threads() == number


def test_networks_trained_together_keep_parameters_aligned_to_16_bytes(evaluator):
    networks = [ConvNet(3, 10, 16, width=4, depth=1) for _ in range(3)]
    # Not a multiple of four, so that rows of (K, P) are not aligned.
    assert sum(p.numel() for p in networks[0].parameters()) % 4
    step = partial(training.sgd_step, ReparamModule(networks[0]))
    plan = Plan(torch.randn(4, 3, 16, 16), torch.arange(4), 0.01, ())
    trainees = [Trainee(plan, network, None, seeded(k)) for k, network in enumerate(networks)]
    evaluator.train_together(step, trainees)
    for parameter in (p for network in networks for p in network.parameters()):
        assert parameter.storage_offset() * parameter.element_size() % 16 == 0
        assert parameter.data_ptr() % 16 == 0


def test_a_pool_with_a_step_trains_its_networks_together(evaluator, data):
    network = utils.initial_network(MODEL, data.form, utils.make_generator(0), CPU)
    calls = []

    def step(*tensors):
        calls.append([tuple(tensor.shape) for tensor in tensors])
        return training.sgd_step(ReparamModule(network), *tensors)

    evaluator.pool[MODEL] = step
    images, labels = data.train
    scores = evaluator(images, labels, 0.01, (0, "key"))[MODEL]
    assert len(scores.test) == 2 and all(0 <= accuracy <= 1 for accuracy in scores.val)
    count = sum(p.numel() for p in network.parameters())
    assert len(calls) == 4 * 8  # epochs, batches of 4
    assert calls[0] == [(2, count), (2, count), (2, 4, 3, 16, 16), (2, 4), (2, 1)]


def test_a_step_that_fails_compiled_is_taken_again_without(monkeypatch):
    network = ConvNet(3, 10, 16, width=4, depth=1)

    def fail(*_):
        raise RuntimeError("Triton failed")

    monkeypatch.setattr(utils, "initial_network", lambda *_: network)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(FAILURES, "seen", False)
    machine = Machine(torch.device("cuda"), ALONE, Compiler())
    step = training.make_sgd_step(MODEL, Form(10, 16), machine)
    theta = torch.cat([p.detach().flatten() for p in network.parameters()])[None]
    inputs = theta, 0 * theta, torch.randn(1, 4, 3, 16, 16), torch.zeros(1, 4).long(), 0.01
    with pytest.warns(UserWarning, match="failed, continuing without it: Triton failed"):
        computed = step(*inputs)
    torch.testing.assert_close(computed, training.sgd_step(ReparamModule(network), *inputs))


# --------------------------------------------------------------------------------------------------
# Scores of a run


@pytest.mark.parametrize("val, best", [([[0.5], [0.6], [0.6]], 1), ([[], [], []], 2)])
def test_validation_images_choose_the_best_iteration_and_test_images_only_without_any(val, best):
    evaluations = Evaluations()
    for it, test in enumerate((0.9, 0.3, 0.95)):
        evaluations.add({"net": Scores(val[it], [test])}, 0.01, [1.0] * it, seconds=0.0, epochs=1)
    assert evaluations.best["iteration"] == best
    assert evaluations.latest_is_best == (best == 2)


def test_the_best_iteration_has_the_highest_mean_of_all_networks():
    evaluations = Evaluations()
    for it, (one, other) in enumerate([(0.2, 0.6), (0.45, 0.45), (0.8, 0.0)]):
        scores = {"one": Scores([one, one], [0.0, 0.0]), "other": Scores([other], [0.0])}
        evaluations.add(scores, 0.01, [1.0] * it, seconds=0.0, epochs=1)
    assert evaluations.best["iteration"] == 1


def test_an_evaluation_has_the_mean_loss_since_the_one_before():
    evaluations = Evaluations()
    losses = []
    for more in ([], [0.5], [0.25, 0.75]):
        losses += more
        evaluations.add({"net": Scores([0.1], [0.1])}, 0.01, losses, seconds=1.26, epochs=1)
    assert [row["loss"] for row in evaluations.rows] == [None, 0.5, 0.5]
    assert [row["iteration"] for row in evaluations.rows] == [0, 1, 3]
    assert evaluations.has(3, {"net"}) and not evaluations.has(2, {"net"})
    assert not evaluations.has(3, {"net", "other"})


def test_scores_survive_their_file():
    rows = [{"iteration": 3, "scores": {"MLP": Scores([], [0.5, 0.25], [[0.5], [0.25]])}}]
    assert from_json(json.loads(json.dumps(to_json(rows)))) == rows
