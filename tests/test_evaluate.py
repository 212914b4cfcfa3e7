"""Evaluation: fresh networks on a set of images; and `--evaluate`, with its export."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_data
from torchvision.datasets import ImageFolder

import distillation
import evaluation
import utils
from datasets import coresets, preprocessing, saved_sets
from datasets.eurosat import CLASS_NAMES
from datasets.preprocessing import Form, Layout
from evaluation import (
    EVAL_POOLS,
    Evaluator,
    Trainee,
    make_pool,
    sets_of,
    sgd_step,
)
from networks import ConvNet
from reparam_module import ReparamModule
from run.scores import Evaluations, Scores, from_json, to_json
from system import process, threads
from system.compilation import FAILURES, Compiler
from system.machine import Machine
from system.process import ReportedError
from system.ranks import ALONE
from utils import Augment

SCRIPT = "distillation.py"
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
    for network, x, k in zip(alone, images, range(3)):
        trainee = Trainee(network, network, seeded(k))
        list(evaluator.evaluate_synset(trainee, (x, labels), 0.02))
    step = partial(sgd_step, ReparamModule(together[0]))
    trainees = [Trainee(network, None, seeded(k)) for k, network in enumerate(together)]
    evaluator.train_together(step, trainees, sets_of(images, labels.expand(3, 7), 3), 0.02)
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
    step = partial(sgd_step, ReparamModule(networks[0]))
    trainees = [Trainee(network, None, seeded(k)) for k, network in enumerate(networks)]
    sets = sets_of(torch.randn(4, 3, 16, 16), torch.arange(4), 3)
    evaluator.train_together(step, trainees, sets, 0.01)
    for parameter in (p for network in networks for p in network.parameters()):
        assert parameter.storage_offset() * parameter.element_size() % 16 == 0
        assert parameter.data_ptr() % 16 == 0


def test_a_pool_with_a_step_trains_its_networks_together(evaluator, data):
    network = utils.initial_network(MODEL, data.form, utils.make_generator(0), CPU)
    calls = []

    def step(*tensors):
        calls.append([tuple(tensor.shape) for tensor in tensors])
        return sgd_step(ReparamModule(network), *tensors)

    evaluator.pool[MODEL] = step
    images, labels = data.train
    scores = evaluator(images, labels, 0.01, (0, "key"))[MODEL]
    assert len(scores.test) == 2 and all(0 <= accuracy <= 1 for accuracy in scores.val)
    count = sum(p.numel() for p in network.parameters())
    assert len(calls) == 4 * 8  # epochs, batches of 4
    assert calls[0] == [(2, count), (2, count), (2, 4, 3, 16, 16), (2, 4), ()]


def test_a_step_that_fails_compiled_is_taken_again_without(monkeypatch):
    network = ConvNet(3, 10, 16, width=4, depth=1)

    def fail(*_):
        raise RuntimeError("Triton failed")

    monkeypatch.setattr(utils, "initial_network", lambda *_: network)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(FAILURES, "seen", False)
    machine = Machine(torch.device("cuda"), ALONE, Compiler())
    step = evaluation.make_sgd_step(MODEL, Form(10, 16), machine)
    theta = torch.cat([p.detach().flatten() for p in network.parameters()])[None]
    inputs = theta, 0 * theta, torch.randn(1, 4, 3, 16, 16), torch.zeros(1, 4).long(), 0.01
    with pytest.warns(UserWarning, match="failed, continuing without it: Triton failed"):
        computed = step(*inputs)
    torch.testing.assert_close(computed, sgd_step(ReparamModule(network), *inputs))


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


# --------------------------------------------------------------------------------------------------
# From the command line: a saved set


@pytest.fixture(scope="module")
def data_flags(eurosat_folder):
    """Flags of both scripts."""
    flags = ["--dataset=ImageFolder", f"--data_path={eurosat_folder}", "--im_size=16"]
    return [*flags, f"--model={MODEL}", "--no-compile", "--wandb_mode=disabled"]


@pytest.fixture(scope="module")
def flags(data_flags):
    return [*data_flags, "--num_eval=2", "--epoch_eval_train=20", "--batch_real=20"]


@pytest.fixture(scope="module")
def saved(run_here, data_flags, flags, tmp_path_factory):
    """The folder of a run whose α is not that of its flags."""
    cwd = tmp_path_factory.mktemp("saved")
    more = ["--num_experts=1", "--train_epochs=2", "--batch_train=32", f"--buffer_path={cwd}"]
    done = run_here("expert_trajectories.py", *data_flags, *more, cwd=cwd)
    assert done.returncode == 0, done.stderr
    more = [f"--buffer_path={cwd}", "--Iteration=2", "--eval_it=2", "--syn_steps=2"]
    more += ["--expert_epochs=1", "--max_start_epoch=2", "--lr_lr=1e-6", "--lr_teacher=0.02"]
    done = run_here(SCRIPT, *flags, *more, "--run_name=run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "logged_files" / "ImageFolder" / "run"


@pytest.fixture
def evaluate(run_here, tmp_path):
    """Evaluate with flags: what is printed, and evaluation.json."""

    def evaluate(*flags):
        done = run_here(SCRIPT, *flags, f"--log_dir={tmp_path / 'logs'}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob("logs/ImageFolder/*/evaluation.json")
        record = json.loads(path.read_text())
        shutil.rmtree(tmp_path / "logs")
        return done.stdout, record

    return evaluate


@pytest.fixture
def refuse(run_here, tmp_path):
    """Run with flags, which shall be refused with a line that has `part`, and write nothing."""

    def refuse(part, *flags):
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        done = run_here(SCRIPT, *flags, cwd=cwd)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert part in done.stderr
        assert not list(cwd.iterdir())

    return refuse


def load(path):
    return torch.load(path, weights_only=True)


def test_a_saved_run_is_evaluated_with_its_own_flags_and_step_size(evaluate, saved):
    out, record = evaluate(f"--evaluate={saved}")
    assert record["syn_lr"] == load(saved / "syn_lr_best.pt").item() != 0.02
    assert record["settings"]["num_eval"] == 2 and record["settings"]["epoch_eval_train"] == 20
    scores = record["scores"][MODEL]
    assert len(scores["val"]) == len(scores["test"]) == len(scores["classes"]) == 2
    for total, classes in zip(scores["test"], scores["classes"]):  # two test images of each class
        assert len(classes) == 10 and sum(classes) / 10 == pytest.approx(total)
    assert all(name in out for name in CLASS_NAMES)
    assert f"{100 * sum(scores['test']) / 2:.2f}%" in out
    assert evaluate(f"--evaluate={saved / 'images_best.pt'}")[1]["scores"] == record["scores"]


def test_a_flag_wins_over_that_of_the_run(evaluate, saved):
    flags = ["--eval_mode=M", "--num_eval=1", "--epoch_eval_train=1", "--lr_teacher=0.02"]
    _, record = evaluate(f"--evaluate={saved}", *flags)
    assert list(record["scores"]) == [MODEL, "MLP"] and record["syn_lr"] == 0.02
    assert len(record["scores"]["MLP"]["test"]) == 1


@pytest.mark.filterwarnings("ignore:.*diverged")
def test_all_networks_of_an_eval_mode_are_trained_and_tested(evaluate, saved):
    flags = ["--eval_mode=N", "--num_eval=1", "--epoch_eval_train=1"]
    out, record = evaluate(f"--evaluate={saved}", *flags)
    assert list(record["scores"]) == [f"ConvNet{norm}N" for norm in "NBLIG"]
    assert all(name in out for name in record["scores"])


def test_a_network_that_diverges_is_named(run_here, saved, tmp_path):
    message = rf"2 of 2 networks \({MODEL}\) diverged in evaluation: α = 1e\+10"
    flags = ["--lr_teacher=1e10", "--epoch_eval_train=2", f"--log_dir={tmp_path}"]
    with pytest.warns(UserWarning, match=message):
        done = run_here(SCRIPT, f"--evaluate={saved}", *flags, cwd=tmp_path)
    assert done.returncode == 0


def test_a_preset_with_learned_labels_leaves_real_images_theirs(monkeypatch):
    command = ["distillation.py", "--preset=eurosat-1", "--evaluate=random"]
    monkeypatch.setattr(sys, "argv", command)
    assert distillation.parse_args().labels == "hard"
    monkeypatch.setattr(sys, "argv", [*command, "--labels=soft"])
    assert distillation.parse_args().labels == "soft"


def test_alpha_is_searched_for_a_set_that_has_none(evaluate, saved, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "ALPHAS", (0.01,))
    for name in ("images", "labels"):
        shutil.copy(saved / f"{name}_best.pt", tmp_path)
    _, record = evaluate(*flags, f"--evaluate={tmp_path / 'images_best.pt'}", "--search_alpha")
    assert record["syn_lr"] == {MODEL: 0.01}


@pytest.mark.filterwarnings("ignore:.*diverged")
def test_alpha_is_chosen_for_each_network_by_validation_accuracy(evaluate, saved, monkeypatch):
    monkeypatch.setattr(evaluation, "ALPHAS", (1e-9, 0.01, 1e10))
    out, record = evaluate(f"--evaluate={saved}", "--eval_mode=M", "--search_alpha")
    assert record["syn_lr"][MODEL] == 0.01 and f"α = 0.01 ({MODEL})" in out
    assert record["syn_lr"].keys() == record["scores"].keys() == {MODEL, "MLP"}
    assert len(record["scores"]["MLP"]["test"]) == 2
    assert out.count("α = 1e+10") == 2  # tried for each


def test_evaluations_with_other_settings_do_not_overwrite_each_other(run_here, saved, tmp_path):
    usual = [f"--evaluate={saved}", "--epoch_eval_train=1", f"--log_dir={tmp_path}"]
    for more in ([], ["--eval_mode=M"], ["--seed=1"]):
        done = run_here(SCRIPT, *usual, "--num_eval=1", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("ImageFolder/evaluate_run_*/evaluation.json"))) == 3


def test_mtts_bare_tensors_need_a_step_size(evaluate, refuse, saved, flags, tmp_path):
    bare = tmp_path / "mtt"
    bare.mkdir()
    for name in ("images", "labels"):
        shutil.copy(saved / f"{name}_best.pt", bare)
    refuse("give --lr_teacher", *flags, f"--evaluate={bare}")
    _, record = evaluate(*flags, f"--evaluate={bare}", "--lr_teacher=0.03")
    assert record["syn_lr"] == 0.03 and record["images"] == 10


def test_random_and_full_are_the_baselines(evaluate, flags):
    _, record = evaluate(*flags, "--evaluate=random", "--ipc=3")
    assert record["images"] == 30 and record["syn_lr"] == 0.01
    out, full = evaluate(*flags, "--evaluate=full", "--num_eval=1", "--batch_train=32")
    assert full["images"] == 160 and "160 training images" in out
    assert max(full["scores"][MODEL]["test"]) > max(record["scores"][MODEL]["test"])


@pytest.mark.parametrize("what", ["random", "herding", "k_center"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_real_images_are_chosen_and_labelled_by_experts(
    evaluate, flags, saved, what, labels, monkeypatch
):
    sets = []
    call = Evaluator.__call__

    def spy(self, images, labels, *rest):
        sets.append((images, labels))
        return call(self, images, labels, *rest)

    monkeypatch.setattr(Evaluator, "__call__", spy)
    buffers = f"--buffer_path={saved.parents[2]}"
    out, record = evaluate(*flags, f"--evaluate={what}", f"--labels={labels}", "--ipc=3", buffers)
    assert record["images"] == 30 and f"real images ({what})" in out
    assert ("labelled by the experts" in out) == (labels == "soft")
    ((images, y),) = sets
    draws = (2,) if what == "random" else ()
    assert images.shape == (*draws, 30, 3, 16, 16)
    assert y.shape == ((*draws, 30, 10) if labels == "soft" else (*draws, 30))
    if labels == "soft":
        torch.testing.assert_close(y.sum(-1), torch.ones(*draws, 30))
        assert y.max() < 1


@pytest.mark.parametrize(
    "given, part",
    [
        (["--evaluate=herding"], "train experts first"),
        (["--evaluate=random", "--labels=soft"], "train experts first"),
        (["--evaluate=random", "--labels=soft", "--label_epoch=99"], "--label_epoch=99 is beyond"),
        (["--evaluate=herding", "--ipc=1000"], "--ipc=1000 is more than the 16 training images"),
    ],
)
def test_sets_that_cannot_be_had_are_refused(refuse, flags, saved, tmp_path, given, part):
    buffers = tmp_path / "none" if part == "train experts first" else saved.parents[2]
    refuse(part, *flags, *given, f"--buffer_path={buffers}")


def test_a_set_is_exported_for_imagefolder_and_dd_ranking(run_here, saved, tmp_path):
    out = tmp_path / "exported"
    done = run_here(SCRIPT, f"--evaluate={saved}", f"--export={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = ImageFolder(out / "images")
    assert pictures.classes == sorted(CLASS_NAMES) and len(pictures) == 10
    assert all(image.size == (16, 16) for image, _ in pictures)
    content = load(out / "dd_ranking.pt")
    assert torch.equal(content["image_tensor"], load(saved / "images_best.pt"))
    assert torch.equal(content["hard_labels"], load(saved / "labels_best.pt"))
    assert content["syn_lr"] == load(saved / "syn_lr_best.pt").item()


def test_the_projects_own_export_scores_as_the_set_that_it_was_made_of(
    run_here, evaluate, flags, saved, tmp_path
):
    out = tmp_path / "exported"
    done = run_here(SCRIPT, f"--evaluate={saved}", f"--export={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, ours = evaluate(*flags, f"--evaluate={saved}")
    for name in (out, out / "dd_ranking.pt"):
        _, theirs = evaluate(*flags, f"--evaluate={name}")
        assert theirs["scores"] == ours["scores"] and theirs["syn_lr"] == ours["syn_lr"]


def test_an_exported_set_is_evaluated_as_its_record_says(run_here, saved, tmp_path):
    out = tmp_path / "exported"
    done = run_here(SCRIPT, f"--evaluate={saved}", f"--export={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data_path = json.loads((saved / "run.json").read_text())["flags"]["data_path"]
    again = [f"--evaluate={out}", f"--data_path={data_path}"]
    done = run_here(SCRIPT, *again, cwd=tmp_path)
    assert done.returncode == 0 and "networks: 2, epochs: 20" in done.stdout, done.stderr
    done = run_here(SCRIPT, *again, "--zca", cwd=tmp_path)
    assert done.returncode == 2 and "zca=False (here True)" in done.stderr


def test_a_set_without_a_record_is_doubted(flags, evaluate, tmp_path):
    torch.save({"image_tensor": IMAGES, "hard_labels": LABELS}, tmp_path / "dd_ranking.pt")
    with pytest.warns(UserWarning, match="has no record of its settings. If it was not made for"):
        evaluate(*flags, f"--evaluate={tmp_path}", "--lr_teacher=0.01")


def test_a_foreign_record_names_no_folder_that_is_written_to(run_here, saved, tmp_path):
    foreign = shutil.copytree(saved, tmp_path / "foreign")
    elsewhere = shutil.copytree(saved_data(saved), tmp_path / "elsewhere")
    for cache in elsewhere.glob("*_cache.pt"):
        cache.unlink()
    record = json.loads((foreign / "run.json").read_text())
    record["flags"]["data_path"] = str(elsewhere)
    (foreign / "run.json").write_text(json.dumps(record))
    before = sorted(elsewhere.rglob("*"))
    done = run_here(SCRIPT, f"--evaluate={foreign}", cwd=tmp_path)
    assert done.returncode == 2 and "--data_path=data" in done.stderr
    assert sorted(elsewhere.rglob("*")) == before


def saved_data(saved):
    return json.loads((saved / "run.json").read_text())["flags"]["data_path"]


SOFT = torch.nn.functional.one_hot(torch.arange(10).repeat(2), 10) * 0.9 + 0.01


def test_a_set_keeps_its_own_classes_beside_soft_labels(tmp_path):
    hard = torch.arange(10).repeat(2)
    content = {"image_tensor": IMAGES.repeat(2, 1, 1, 1), "hard_labels": hard, "soft_labels": SOFT}
    torch.save(content, tmp_path / "dd_ranking.pt")
    loaded = saved_sets.load_set(tmp_path, Form(10, 16), 1, "--evaluate")
    assert torch.equal(loaded.classes, hard) and torch.equal(loaded.labels, SOFT)
    # In another order, and without classes, the likeliest are taken.
    del content["hard_labels"]
    torch.save(content, tmp_path / "dd_ranking.pt")
    assert torch.equal(saved_sets.load_set(tmp_path, Form(10, 16), 1, "--evaluate").classes, hard)


def test_labels_that_are_logits_are_taken_as_such(tmp_path):
    torch.save(IMAGES.repeat(2, 1, 1, 1), tmp_path / "images_best.pt")
    torch.save(SOFT.log() + 3, tmp_path / "labels_best.pt")
    with pytest.warns(UserWarning, match="are no probabilities: taken as logits"):
        loaded = saved_sets.load_set(tmp_path, Form(10, 16), 1, "--evaluate")
    torch.testing.assert_close(loaded.labels, SOFT)


def test_a_set_in_half_precision_is_read_in_single(tmp_path):
    images = torch.randn(10, 3, 16, 16, generator=utils.make_generator(0))
    torch.save(images.half(), tmp_path / "images_best.pt")
    torch.save(torch.arange(10), tmp_path / "labels_best.pt")
    loaded = saved_sets.load_set(tmp_path, Form(10, 16), 1, "--evaluate").images
    assert loaded.dtype == torch.float32 and torch.equal(loaded, images.half().float())


def test_changed_bytes_of_a_set_are_noticed(refuse, flags, tmp_path):
    torch.save(IMAGES, tmp_path / "images_best.pt")
    content = bytearray((tmp_path / "images_best.pt").read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / "images_best.pt").write_bytes(content)
    torch.save(LABELS, tmp_path / "labels_best.pt")
    refuse("images_best.pt is damaged", *flags, f"--evaluate={tmp_path}", "--lr_teacher=1")


def test_sets_of_other_tools_are_read(evaluate, refuse, flags, tmp_path):
    """DC's and DM's file with numpy's accuracies, DATM's name of α, other types of numbers."""
    pairs = [[torch.zeros(10, 3, 16, 16), LABELS], [IMAGES, LABELS]]
    accuracies = {"ConvNet": [np.float64(0.5), np.float32(0.5)]}
    torch.save({"data": pairs, "accs_all_exps": accuracies}, tmp_path / "res_DC.pt")
    _, last = evaluate(*flags, f"--evaluate={tmp_path / 'res_DC.pt'}", "--lr_teacher=0.01")

    torch.save(IMAGES, tmp_path / "images_best.pt")
    torch.save(LABELS.double(), tmp_path / "labels_best.pt")
    torch.save(0.01, tmp_path / "lr_best.pt")
    _, bare = evaluate(*flags, f"--evaluate={tmp_path}")
    assert bare["scores"] == last["scores"] and bare["syn_lr"] == 0.01

    torch.save(IMAGES.half(), tmp_path / "images_best.pt")
    torch.save(torch.eye(10), tmp_path / "labels_best.pt")
    _, soft = evaluate(*flags, f"--evaluate={tmp_path}")
    assert soft["images"] == 10

    for labels, reference in ((LABELS.int(), bare), (torch.eye(10).long(), soft)):
        content = {"image_tensor": IMAGES.double(), "soft_labels": None, "hard_labels": labels}
        torch.save(content | {"syn_lr": 0.01}, tmp_path / "set.pt")
        _, read = evaluate(*flags, f"--evaluate={tmp_path / 'set.pt'}")
        assert read["scores"] == reference["scores"]
    torch.save({"data": 5}, tmp_path / "set.pt")
    refuse("no images with labels, but a dict", *flags, f"--evaluate={tmp_path / 'set.pt'}")
    (tmp_path / "cwd").rmdir()

    torch.save(IMAGES, tmp_path / "syn.pt")
    refuse("there are no labels: name a run", *flags, f"--evaluate={tmp_path / 'syn.pt'}")


# --------------------------------------------------------------------------------------------------
# What cannot be evaluated


def test_an_export_does_not_overwrite_another(refuse, saved, tmp_path):
    out = tmp_path / "exported"
    out.mkdir()
    (out / "dd_ranking.pt").write_text("somebody's")
    refuse("dd_ranking.pt is there already", f"--evaluate={saved}", f"--export={out}")


IMAGES, LABELS = torch.zeros(10, 3, 16, 16), torch.arange(10)


@pytest.mark.parametrize(
    "images, labels",
    [
        (torch.zeros(10, 3, 8, 8), LABELS),
        (torch.zeros(0, 3, 16, 16), torch.arange(0)),
        (torch.full((10, 3, 16, 16), torch.nan), LABELS),
        ((255 * IMAGES).byte(), LABELS),
        ([1, 2], LABELS),
        (IMAGES, torch.arange(9)),
        (IMAGES, LABELS + 1),
        (IMAGES, LABELS + 0.5),
        (IMAGES, torch.full((10, 10), torch.nan)),
        (IMAGES.to_sparse(), LABELS),
    ],
)
def test_foreign_tensors_are_refused(refuse, flags, images, labels, tmp_path):
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(labels, tmp_path / "labels_best.pt")
    place = f"--evaluate={tmp_path}"
    refuse("holds no synthetic images", *flags, place, "--lr_teacher=0.01")


@pytest.mark.parametrize("syn_lr", [-0.1, torch.tensor(torch.nan), torch.ones(2), [0.1], 1e300])
def test_a_saved_step_size_that_is_none_is_refused(refuse, flags, syn_lr, tmp_path):
    torch.save(IMAGES, tmp_path / "images_best.pt")
    torch.save(LABELS, tmp_path / "labels_best.pt")
    torch.save(syn_lr, tmp_path / "syn_lr_best.pt")
    refuse("is no step size", *flags, f"--evaluate={tmp_path}")


def test_a_file_that_is_no_tensor_is_named(refuse, flags, tmp_path):
    (tmp_path / "images_best.pt").write_text("hello")
    torch.save(LABELS, tmp_path / "labels_best.pt")
    refuse("images_best.pt cannot be read", *flags, f"--evaluate={tmp_path}", "--lr_teacher=1")


def test_canvases_need_texture(refuse, evaluate, flags, tmp_path):
    torch.save(torch.zeros(10, 3, 32, 32), tmp_path / "images_best.pt")
    torch.save(LABELS, tmp_path / "labels_best.pt")
    flags = [*flags, f"--evaluate={tmp_path}", "--lr_teacher=0.01", "--epoch_eval_train=1"]
    refuse("canvases need --texture", *flags)
    _, record = evaluate(*flags, "--texture", "--canvas_samples=2")
    assert record["images"] == 10


@pytest.mark.parametrize(
    "flag, part",
    [
        ("--val_fraction=0.2", "val_fraction=0.1 (here 0.2)"),
        ("--zca", "zca=False (here True)"),
        ("--dataset=ToySAT", "dataset='ImageFolder' (here 'ToySAT')"),
    ],
)
def test_sets_for_other_data_are_refused_before_minutes_of_whitening(
    refuse, saved, monkeypatch, flag, part
):
    monkeypatch.setattr(preprocessing, "whiten", lambda *_: pytest.fail("whitens"))
    refuse(part, f"--evaluate={saved}", flag)


def test_images_that_are_no_canvases_are_not_taken_for_such(refuse, saved):
    refuse("texture=False (here True)", f"--evaluate={saved}", "--texture")
