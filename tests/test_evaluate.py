"""`--evaluate`: saved sets, real images and coresets, sets of other tools, and exports."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

import distillation
import evaluation
import utils
from datasets import preprocessing, saved_sets, set_files
from datasets.eurosat import CLASS_NAMES
from datasets.preprocessing import Form
from evaluation import Evaluator

SCRIPT = "distillation.py"
MODEL = "ConvNetD1"


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


def test_real_images_keep_their_defaults_beside_an_initial_set(monkeypatch, saved):
    monkeypatch.setattr(sys, "argv", ["distillation.py", "--evaluate=full", f"--pix_init={saved}"])
    args = distillation.parse_args()
    assert (args.epoch_eval_train, args.lr_teacher) == (50, 0.01)


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
    assert out.count("α = 1e+10") == out.count("(diverged)") == 2  # tried for each


def test_evaluations_with_other_settings_do_not_overwrite_each_other(run_here, saved, tmp_path):
    usual = [f"--evaluate={saved}", "--epoch_eval_train=1", f"--log_dir={tmp_path}"]
    for more in ([], ["--eval_mode=M"], ["--seed=1"]):
        done = run_here(SCRIPT, *usual, "--num_eval=1", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("ImageFolder/evaluate_run_*/evaluation.json"))) == 3


def test_mtts_bare_tensors_need_a_step_size(evaluate, refuse, run_here, saved, flags, tmp_path):
    bare = tmp_path / "mtt"
    bare.mkdir()
    for name in ("images", "labels"):
        shutil.copy(saved / f"{name}_best.pt", bare)
    refuse("give --lr_teacher", *flags, f"--evaluate={bare}")
    _, record = evaluate(*flags, f"--evaluate={bare}", "--lr_teacher=0.03")
    assert record["syn_lr"] == 0.03 and record["images"] == 10
    done = run_here(SCRIPT, *flags, f"--evaluate={bare}", "--export=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # no network is trained
    assert torch.load(tmp_path / "out" / "dd_ranking.pt", weights_only=True)["syn_lr"] is None
    _, exported = evaluate(*flags, f"--evaluate={tmp_path / 'out'}", "--lr_teacher=0.03")
    assert exported["scores"] == record["scores"]
    done = run_here(SCRIPT, *flags, "--evaluate=out", "--export=again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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


def test_flags_of_an_export_do_not_take_the_place_of_those_of_the_run(
    run_here, evaluate, flags, saved, tmp_path
):
    out = tmp_path / "exported"
    other = ["--seed=7", "--num_eval=1", "--epoch_eval_train=1"]
    done = run_here(SCRIPT, f"--evaluate={saved}", f"--export={out}", *other, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    given = json.loads((saved / "run.json").read_text())["flags"]
    kept = json.loads(load(out / "dd_ranking.pt")["record"])["flags"]
    assert all(kept[name] == given[name] for name in kept)
    gone = given.keys() - kept.keys()
    assert {"device", "data_path", "buffer_path", "wandb_mode"} <= gone and "seed" not in gone
    data_path = f"--data_path={given['data_path']}"
    ours, theirs = (evaluate(f"--evaluate={what}", data_path)[1] for what in (saved, out))
    assert ours["scores"] == theirs["scores"]


def test_an_export_keeps_its_record_beside_another_run(run_here, saved, tmp_path):
    beside = shutil.copytree(saved, tmp_path / "beside")
    done = run_here(SCRIPT, f"--evaluate={saved}", f"--export={beside}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((beside / "run.json").read_text())
    record["flags"]["seed"] = 7
    (beside / "run.json").write_text(json.dumps(record))
    assert set_files.read_record(beside, "").flags["seed"] == 7
    assert set_files.read_record(beside / "dd_ranking.pt", "").flags["seed"] == 0


@pytest.mark.parametrize("record", ['{"settings": 1, "flags": {}, "wandb_id": ""}', "{", "[]"])
def test_a_damaged_record_in_a_file_is_named(refuse, flags, record, tmp_path):
    content = {"image_tensor": IMAGES, "hard_labels": LABELS, "record": record}
    torch.save(content, tmp_path / "set.pt")
    refuse("the record in", *flags, f"--evaluate={tmp_path / 'set.pt'}")


def test_a_set_without_a_record_is_doubted(flags, evaluate, tmp_path):
    torch.save({"image_tensor": IMAGES, "hard_labels": LABELS}, tmp_path / "dd_ranking.pt")
    with pytest.warns(UserWarning, match="has no record of its settings. If it was not made for"):
        evaluate(*flags, f"--evaluate={tmp_path}", "--lr_teacher=0.01")


def test_a_foreign_record_names_no_folder_that_is_written_to(run_here, saved, tmp_path):
    foreign = shutil.copytree(saved, tmp_path / "foreign")
    elsewhere = shutil.copytree(saved_data(saved), tmp_path / "elsewhere")
    for name in ("*_cache.pt", "zca_*.pt"):  # other tests whiten
        for cache in elsewhere.glob(name):
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


def test_a_set_whose_memory_is_in_another_order_is_read(tmp_path):
    torch.save(IMAGES.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), tmp_path / "images.pt")
    torch.save(torch.arange(10), tmp_path / "labels.pt")
    loaded = saved_sets.load_set(tmp_path / "images.pt", Form(10, 16), 1, "--pix_init")
    assert loaded.images.is_contiguous() and torch.equal(loaded.images, IMAGES)


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


def test_folders_that_cannot_be_written_are_refused_before_networks_are_trained(
    run_here, flags, saved, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation.Evaluator, "__call__", None)
    (tmp_path / "file").touch()
    name = tmp_path / "ImageFolder"
    name.mkdir()
    (name / "run").touch()
    places = [f"--log_dir={tmp_path / 'file'}", f"--log_dir={tmp_path / 'file/below'}"]
    for place in (*places, "--run_name=run", f"--export={tmp_path / 'file'}"):
        what = [f"--evaluate={saved}", f"--log_dir={tmp_path}", place]
        done = run_here(SCRIPT, *flags, *what, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "written (Not a directory" in done.stderr


def test_too_many_images_for_a_kernel_machine_are_refused_before_networks_are_trained(
    refuse, flags, monkeypatch
):
    monkeypatch.setattr(evaluation, "MOST_IMAGES", 159)
    monkeypatch.setattr(evaluation.Evaluator, "evaluate", None)
    part = "NTK, a kernel machine, of 160 images is too large"
    refuse(part, *flags, "--evaluate=full", "--eval_mode=K")


def test_a_damaged_record_is_no_reason_to_remove_the_set(refuse, saved, tmp_path):
    there = shutil.copytree(saved, tmp_path / "there")
    (there / "run.json").write_text("{")
    refuse("restore it from a copy, or remove it and give the flags", f"--evaluate={there}")


def test_evaluations_with_other_experts_do_not_overwrite_each_other(
    run_here, data_flags, flags, saved, tmp_path
):
    name = "ImageFolder_NO_ZCA"
    shutil.copytree(saved.parents[2] / name, tmp_path / name)
    more = ["--num_experts=2", "--train_epochs=2", "--batch_train=32", f"--buffer_path={tmp_path}"]
    done = run_here("expert_trajectories.py", *data_flags, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder in (saved.parents[2], tmp_path):
        what = ["--evaluate=random", "--labels=soft", f"--buffer_path={folder}"]
        done = run_here(SCRIPT, *flags, *what, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    paths = list(tmp_path.glob("logged_files/*/*/evaluation.json"))
    experts = {json.loads(path.read_text())["settings"]["experts"] for path in paths}
    assert len(paths) == len(experts) == 2


TARGETS = [torch.zeros(9, 10), torch.full((10, 10), torch.nan), "none"]
TARGETS += [torch.zeros(10, 10, dtype=torch.uint16)]


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_that_are_none_are_refused(refuse, flags, targets, tmp_path):
    content = {"image_tensor": IMAGES, "hard_labels": LABELS, "targets": targets}
    torch.save(content, tmp_path / "set.pt")
    what = [f"--evaluate={tmp_path / 'set.pt'}", "--lr_teacher=0.01"]
    refuse("holds no targets of a kernel machine, (10, 10) float32 and finite", *flags, *what)
