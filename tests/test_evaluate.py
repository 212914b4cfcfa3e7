"""`distillation.py --evaluate`: saved sets, random real images, all training images; and their export."""

import json
import shutil

import pytest
import torch
from torchvision.datasets import ImageFolder

from datasets import CLASS_NAMES

SCRIPT = "distillation.py"


@pytest.fixture(scope="module")
def flags(eurosat_folder):
    return ["--dataset=EuroSAT", f"--data_path={eurosat_folder}", "--model=ConvNetW32", "--no-compile", "--num_eval=2",
            "--epoch_eval_train=30", "--batch_real=20"]


@pytest.fixture(scope="module")
def saved(run_here, flags, buffers, tmp_path_factory):
    """The folder of a run whose α is not that of its flags."""
    cwd = tmp_path_factory.mktemp("saved")
    done = run_here(SCRIPT, *flags, f"--buffer_path={buffers}", "--Iteration=2", "--eval_it=2", "--syn_steps=2",
                    "--expert_epochs=1", "--max_start_epoch=2", "--lr_lr=1e-6", "--lr_teacher=0.02", "--run_name=run",
                    "--wandb_mode=disabled", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "logged_files" / "EuroSAT" / "run"


@pytest.fixture
def evaluate(run_here, tmp_path):
    """Evaluate with flags: what is printed, and evaluation.json."""

    def evaluate(*flags):
        done = run_here(SCRIPT, *flags, f"--log_dir={tmp_path / 'logs'}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob("logs/EuroSAT/*/evaluation.json")
        record = json.loads(path.read_text())
        shutil.rmtree(tmp_path / "logs")
        return done.stdout, record

    return evaluate


def test_a_saved_run_is_evaluated_with_its_own_flags_and_step_size(evaluate, saved):
    out, record = evaluate(f"--evaluate={saved}")
    assert record["syn_lr"] == torch.load(saved / "syn_lr_best.pt", weights_only=True).item() != 0.02
    assert record["settings"]["num_eval"] == 2 and record["settings"]["epoch_eval_train"] == 30
    scores = record["scores"]["ConvNetW32"]
    assert len(scores["val"]) == len(scores["test"]) == len(scores["classes"]) == 2
    for total, classes in zip(scores["test"], scores["classes"]):  # two test images of each class
        assert len(classes) == 10 and sum(classes) / 10 == pytest.approx(total)
    assert all(name in out for name in CLASS_NAMES) and f"{100 * sum(scores['test']) / 2:.2f}%" in out
    assert evaluate(f"--evaluate={saved / 'images_best.pt'}")[1]["scores"] == record["scores"]


def test_a_flag_wins_over_that_of_the_run(evaluate, saved):
    _, record = evaluate(f"--evaluate={saved}", "--eval_mode=M", "--num_eval=1", "--epoch_eval_train=1")
    assert list(record["scores"]) == ["ConvNetW32", "MLP"] and len(record["scores"]["MLP"]["test"]) == 1


def test_a_step_size_that_is_given_wins_over_the_saved_one(evaluate, saved):
    assert evaluate(f"--evaluate={saved}", "--lr_teacher=0.02", "--num_eval=1")[1]["syn_lr"] == 0.02


def test_a_network_that_diverges_is_named(run_here, saved, tmp_path):
    with pytest.warns(UserWarning, match=r"2 of 2 networks \(ConvNetW32\) diverged in evaluation: α = 1e\+10"):
        done = run_here(SCRIPT, f"--evaluate={saved}", "--lr_teacher=1e10", f"--log_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0


def test_evaluations_with_other_settings_do_not_overwrite_each_other(run_here, saved, tmp_path):
    for flags_ in (["--num_eval=1"], ["--num_eval=1", "--eval_mode=M"], ["--num_eval=1", "--seed=1"]):
        done = run_here(SCRIPT, f"--evaluate={saved}", "--epoch_eval_train=1", f"--log_dir={tmp_path}", *flags_,
                        cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("EuroSAT/evaluate_run_*/evaluation.json"))) == 3


def test_mtts_bare_tensors_need_a_step_size(evaluate, run_here, saved, flags, tmp_path):
    bare = tmp_path / "mtt"
    bare.mkdir()
    for name in ("images", "labels"):
        shutil.copy(saved / f"{name}_best.pt", bare)
    done = run_here(SCRIPT, *flags, f"--evaluate={bare}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "give --lr_teacher" in done.stderr
    _, record = evaluate(*flags, f"--evaluate={bare}", "--lr_teacher=0.03")
    assert record["syn_lr"] == 0.03 and record["images"] == 10


def test_random_and_full_are_the_baselines(evaluate, flags):
    _, record = evaluate(*flags, "--evaluate=random", "--ipc=3")
    assert record["images"] == 30 and record["syn_lr"] == 0.01
    out, full = evaluate(*flags[:-2], "--evaluate=full", "--num_eval=1", "--batch_train=32", "--batch_real=20")
    assert full["images"] == 160 and full["settings"]["epoch_eval_train"] == 50 and "160 training images" in out
    assert max(full["scores"]["ConvNetW32"]["test"]) > max(record["scores"]["ConvNetW32"]["test"])


def test_a_set_is_exported_for_imagefolder_and_dd_ranking(run_here, saved, tmp_path):
    out = tmp_path / "exported"
    done = run_here(SCRIPT, f"--evaluate={saved}", f"--export={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = ImageFolder(out / "images")
    assert pictures.classes == sorted(CLASS_NAMES) and len(pictures) == 10
    assert all(image.size == (64, 64) for image, _ in pictures)
    content = torch.load(out / "dd_ranking.pt", weights_only=True)
    for key, name in (("image_tensor", "images"), ("hard_labels", "labels")):
        assert torch.equal(content[key], torch.load(saved / f"{name}_best.pt", weights_only=True))
    assert content["syn_lr"] == torch.load(saved / "syn_lr_best.pt", weights_only=True).item()


@pytest.mark.parametrize("flags_, parts", [
    (["--evaluate=nowhere"], ["nowhere", "images_*.pt", "random"]),
    (["--evaluate="], ["--evaluate=''", "names nothing"]),
    (["--export=out"], ["--export", "--evaluate"]),
    (["--evaluate=random", "--export=out"], ["--export", "--evaluate"]),
    (["--evaluate=random", "--resume=there"], ["--resume", "--evaluate", "leave one out"]),
])
def test_what_cannot_be_evaluated_is_refused_in_one_line(run_here, flags, flags_, parts, tmp_path):
    done = run_here(SCRIPT, *flags, *flags_, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("images, labels", [
    (torch.zeros(10, 3, 32, 32), torch.arange(10)), (torch.zeros(10, 3, 64, 64), torch.arange(9)),
    (torch.zeros(10, 3, 64, 64), torch.arange(10) + 1), (torch.full((10, 3, 64, 64), torch.nan), torch.arange(10)),
    ([1, 2], torch.arange(10)), (torch.zeros(10, 3, 64, 64), torch.zeros(10)),
])
def test_foreign_tensors_are_refused(run_here, flags, images, labels, tmp_path):
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(labels, tmp_path / "labels_best.pt")
    done = run_here(SCRIPT, *flags, f"--evaluate={tmp_path}", "--lr_teacher=0.01", cwd=tmp_path)
    assert done.returncode == 2 and "holds no synthetic images" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("syn_lr", [torch.tensor(-0.1), torch.tensor(torch.nan), torch.ones(2), [0.1]])
def test_a_saved_step_size_that_is_none_is_refused(run_here, flags, saved, syn_lr, tmp_path):
    for name in ("images", "labels"):
        shutil.copy(saved / f"{name}_best.pt", tmp_path)
    torch.save(syn_lr, tmp_path / "syn_lr_best.pt")
    done = run_here(SCRIPT, *flags, f"--evaluate={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2 and "holds no step size" in done.stderr and done.stderr.count("\n") == 1


def test_canvases_need_texture(run_here, flags, tmp_path):
    torch.save(torch.zeros(10, 3, 128, 128), tmp_path / "images_best.pt")
    torch.save(torch.arange(10), tmp_path / "labels_best.pt")
    done = run_here(SCRIPT, *flags, f"--evaluate={tmp_path}", "--lr_teacher=0.01", cwd=tmp_path)
    assert done.returncode == 2 and "canvases need --texture" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--export=elsewhere", "--log_dir=elsewhere", 1, "--run_name=x"])
def test_a_foreign_run_cannot_name_folders(run_here, saved, flag, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "run")
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"flags": [*run["flags"], flag]}))
    done = run_here(SCRIPT, f"--evaluate={copy}", cwd=tmp_path)
    assert done.returncode == 2 and "run.json is damaged" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_images_made_with_other_preprocessing_are_refused(run_here, saved, tmp_path):
    done = run_here(SCRIPT, f"--evaluate={saved}", "--val_fraction=0.2", cwd=tmp_path)
    assert done.returncode == 2 and "val_fraction=0.1 (here 0.2)" in done.stderr
