"""What a person sees of a run: grids, curves, tables, and what wandb is told."""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import arguments
from PIL import Image

from objectives import OBJECTIVES
from run import report, show, wandb_page
from run.folder import Run
from run.report import draw_grid
from run.scores import Evaluations, Scores
from system.ranks import ALONE

NAMES = ["beach", "forest"]


def evaluations(*tests, val=True):
    """Evaluations of an MLP, one iteration apart, with these accuracies of two networks each."""
    rows = Evaluations()
    for it, accuracies in enumerate(tests):
        scores = Scores(list(accuracies) if val else [], list(accuracies), [[0.5, 1.0]] * 2)
        rows.add({"MLP": scores}, 0.01 + it / 1000, [0.9] * it, seconds=3661.0 * it, epochs=1)
    return rows


@pytest.fixture
def run(tmp_path):
    """As much of a run's flags, folder, state and data as reports look at."""
    losses = [0.9, 0.8]
    args = arguments(model="MLP", ipc=2, Iteration=len(losses))
    folder = Run(tmp_path / "run", ALONE, "id")
    data = SimpleNamespace(train=(None, torch.arange(9)), classes=NAMES, zca=None, settings={})
    data.to_pixels = lambda images: images / 2 + 0.5
    state = SimpleNamespace(
        images=torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        label_syn=torch.tensor([0, 0, 1, 1]),
        labels=torch.tensor([0, 0, 1, 1]),
        alpha=0.012,
        losses=losses,
        evaluations=evaluations((0.2, 0.2), (0.5, 0.7), (0.4, 0.4)),
        baselines=[{"syn_lr": 0.01, "scores": {"MLP": Scores([0.3, 0.3], [0.25, 0.35])}}],
        seconds_before=0.0,
        learned={"images", "alpha"},
        targets=None,
        finished=False,
    )
    return args, folder, state, data


EXPERTS = SimpleNamespace(members=[None] * 3, test_accuracies=[0.8, 0.9])


# --------------------------------------------------------------------------------------------------
# Grids


@pytest.mark.parametrize("count, columns, rows", [(3, 3, 1), (10, 5, 2), (11, 10, 2), (20, 10, 2)])
def test_a_grid_shows_every_image_in_its_order(count, columns, rows):
    images = torch.zeros(count, 3, 64, 64)
    for index, image in enumerate(images):
        image[:, 30:34, 2 * index + 1 : 2 * index + 3] = 1  # a white mark whose place tells which
    picture = np.array(draw_grid(images, ["beach"] * count, "title")).max(2)
    areas, _ = scipy.ndimage.label(picture == 0)
    tiles = [tile for tile in scipy.ndimage.find_objects(areas) if picture[tile].size > 1000]
    marks = [np.argmax(picture[tile].max(0) == 255) / picture[tile].shape[1] * 64 for tile in tiles]
    assert [round((mark - 1) / 2) for mark in marks] == list(range(count))  # in reading order
    assert len({tile[1].start for tile in tiles}) == columns
    assert len({tile[0].start for tile in tiles}) == rows


@pytest.mark.parametrize("limit", ["MAX_SIDE", "MAX_PIXELS"])
def test_a_grid_of_too_many_images_says_how_many_it_shows(monkeypatch, limit):
    titles = []
    draw = report.ImageDraw.Draw

    def spy(picture):
        pen = draw(picture)
        monkeypatch.setattr(pen, "text", lambda place, text, **_: titles.append(text))
        return pen

    monkeypatch.setattr(report.ImageDraw, "Draw", spy)
    monkeypatch.setattr(report, limit, {"MAX_SIDE": 2000, "MAX_PIXELS": 2 * 10**6}[limit])
    images = torch.zeros(1).expand(500, 3, 32, 32)
    picture = draw_grid(images, ["beach"] * 500, "title")
    assert picture.height <= 2000 or picture.width * picture.height <= 2.1 * 10**6
    (shown,) = (int(t.split(", ")[1].split(" of 500")[0]) for t in titles if " of 500 images" in t)
    assert 50 < shown < 500 and shown % 10 == 0 and titles.count("beach") == shown


def test_the_largest_grid_fits_into_an_animation():
    assert report.MAX_SIDE < 2**16 - 1000  # GIF's limit
    assert report.MAX_PIXELS < Image.MAX_IMAGE_PIXELS  # where Pillow warns
    images = torch.zeros(1).expand(3000, 3, 16, 16)
    picture = draw_grid(images, ["beach"] * 3000, "title")
    assert picture.width * picture.height < 1.1 * report.MAX_PIXELS
    assert max(picture.size) < 2**16


def test_a_name_that_is_too_long_ends_with_its_image():
    images = torch.zeros(3, 3, 64, 64)
    short, long = (draw_grid(images, [name] * 3, "title") for name in ("i", "i" * 200))
    assert short.size == long.size
    short, long = (np.array(picture) for picture in (short, long))
    assert (short != long).any()  # that it is drawn
    gaps = (short == 255).all((0, 2))  # between tiles, and left of the first one
    assert 20 < gaps.sum() and (long[:, gaps] == 255).all()


def test_each_image_is_drawn_in_its_own_range():
    dark = torch.linspace(-0.2, -0.1, 192).view(3, 8, 8)
    for image in (dark, 100 * dark):
        drawn = np.array(report.draw_image(image))
        assert drawn.shape == (8, 8, 3) and (drawn.min(), drawn.max()) == (0, 255)
    assert not np.array(report.draw_image(torch.ones(3, 8, 8))).any()  # no division by zero


@pytest.mark.parametrize("low, high, drawn", [(0.2, 0.6, (51, 153)), (-1.0, 3.0, (0, 255))])
def test_pixels_of_real_images_have_their_true_colours(low, high, drawn):
    image = torch.full((3, 8, 8), low)
    image[:, 0] = high
    picture = np.array(report.draw_image(image, pixels=True))
    assert (picture.min(), picture.max()) == drawn


def test_values_far_from_the_mean_are_cut_off():
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = 1000
    clipped = report.clip(images)
    assert clipped.max() == pytest.approx(float(images.mean() + 2.5 * images.std()))
    assert torch.equal(clipped[1:], images[1:])


# --------------------------------------------------------------------------------------------------
# Files of an evaluation


@pytest.mark.parametrize("latest, kept", [((0.8, 0.8), True), ((0.1, 0.1), False)])
def test_tensors_are_kept_of_a_new_best_but_pictures_of_all(run, latest, kept):
    args, run, state, data = run
    args.Iteration = 5000
    state.evaluations = evaluations((0.2, 0.2), (0.5, 0.7), latest)
    show.evaluation(args, run, state, data)
    names = {path.name for path in run.folder.iterdir()}
    tensors = {f"{n}_{tag}.pt" for n in ("images", "labels", "syn_lr") for tag in ("2", "best")}
    assert names == {"grid_000002.png"} | (tensors if kept else set())


@pytest.mark.parametrize("iteration, kept", [(999, False), (1000, True), (4999, True)])
def test_tensors_are_kept_of_every_thousandth_iteration_and_of_the_last(run, iteration, kept):
    args, _, state, _ = run
    args.Iteration = 4999
    state.losses = [0.9] * iteration
    assert show.is_kept(args, state) == kept


@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_curves_are_drawn_of_few_and_of_many_iterations(run, val, count):
    args, run, state, _ = run
    state.evaluations = evaluations(*[(0.2, 0.3)] * count, val=val)
    state.losses = [0.9] * (200 * (count - 1))
    report.save_curves(
        run.folder / "curves.png", show.curves_of(args, state, OBJECTIVES[args.objective])
    )
    with Image.open(run.folder / "curves.png") as picture:
        assert picture.size == (1600, 450) and len(picture.getcolors(2**20)) > 100


def test_an_animation_has_a_frame_per_grid_in_their_order(tmp_path):
    for it, grey in ((0, 50), (500, 100), (1000, 150)):
        Image.new("L", (20, 10), grey).save(tmp_path / f"grid_{it:06d}.png")
    report.save_animation(tmp_path)
    with Image.open(tmp_path / "animation.gif") as animation:
        assert animation.n_frames == 3 and animation.info["loop"] == 0
        for frame, grey in enumerate((50, 100, 150)):
            animation.seek(frame)
            assert abs(int(np.array(animation.convert("L"))[5, 5]) - grey) <= 2


def test_results_are_json_with_every_number(run):
    _, run, state, data = run
    inputs = SimpleNamespace(data=data, experts=EXPERTS, machine="CPU")
    run.save_results(show.facts_about(inputs, {"model": "MLP"}), state)
    content = report.files.read_json(
        run.folder / "results.json",
        evaluations=list,
        random_real=list,
        settings=dict,
        device=str,
    )
    assert [row["iteration"] for row in content["evaluations"]] == [0, 1, 2]
    assert content["evaluations"][1]["scores"]["MLP"]["test"] == [0.5, 0.7]
    assert content["random_real"][0]["scores"]["MLP"]["val"] == [0.3, 0.3]
    assert content["settings"] == {"model": "MLP"}
    assert content["device"] == "CPU"


# --------------------------------------------------------------------------------------------------
# Lines


def test_a_run_opens_with_what_it_is_or_where_it_resumes(run, capsys):
    _, run, state, _ = run
    dashboard = SimpleNamespace(where_to_look=lambda: "no wandb")
    show.print_opening(run, state, EXPERTS, dashboard)
    lines = capsys.readouterr().out.splitlines()
    assert "4, experts: 3" in lines[0] and str(run.folder) in lines[0]
    assert lines[-1] == report.EVALUATION_HEADER and len(lines) == 3
    state.seconds_before = 1.0
    show.print_opening(run, state, EXPERTS, dashboard)
    assert "resuming at iteration 2" in capsys.readouterr().out


def test_an_evaluation_takes_a_line_under_the_header_per_network():
    first, second = evaluations((0.25, 0.25), (0.5, 0.75)).rows
    line = report.evaluation_lines(second)
    assert line.split() == "1 MLP 62.50% ± 12.50% 62.50% ± 12.50% 0.01100 0.9000 1:01:01".split()
    assert len(line) == len(report.evaluation_lines(first)) == len(report.EVALUATION_HEADER)
    assert report.EVALUATION_HEADER.index("network") == line.index("MLP")


def test_the_closing_table_compares_real_distilled_and_all_images(run):
    _, run, state, data = run
    table = show.closing_table(run, state, data, EXPERTS)
    _, best, header, real, distilled, experts, place = table.splitlines()
    assert best == "Best iteration: 1" and header.split()[:3] == ["trained", "on", "α"]
    assert real.split()[:6] == ["4", "random", "real", "images", "0.01000", "MLP"]
    assert distilled.split() == (
        "4 distilled images 0.01100 MLP 60.00% ± 10.00% 60.00% ± 10.00%".split()
    )
    assert experts.split() == "all 9 images (experts) 85.00% ± 5.00%".split()
    assert experts.index("85.00%") == distilled.rindex("60.00%")  # the column of the test set
    assert str(run.folder) in place


def test_the_scores_of_a_saved_set_have_a_line_per_class():
    scores = {"MLP": Scores([], [0.5, 0.75], [[0.0, 1.0], [0.5, 1.0]])}
    lines = report.scores_table(scores, NAMES).splitlines()
    assert lines[1].split() == ["MLP", "62.50%", "±", "12.50%"]
    assert lines[-2].split() == ["beach", "25.00%", "±", "25.00%"]
    assert lines[-1].split() == ["forest", "100.00%", "±", "0.00%"]


# --------------------------------------------------------------------------------------------------
# Weights & Biases


@pytest.mark.parametrize("val", [True, False])
def test_wandb_is_told_the_latest_accuracy_and_that_of_the_best(val):
    log = wandb_page.score_log(evaluations((0.2, 0.2), (0.5, 0.7), (0.4, 0.4), val=val).rows)
    assert log["Accuracy/MLP"] == pytest.approx(0.4) and log["Std/MLP"] == pytest.approx(0)
    assert log["Max_Accuracy/MLP"] == pytest.approx(0.6)
    assert log["Max_Std/MLP"] == pytest.approx(0.1)
    assert log["Loss"] == pytest.approx(0.9)
    assert ("Val_Accuracy/MLP" in log) == val
    # Panels of `wandb leet` cut their titles at an underscore or a slash.
    assert len({key[:9] for key in log}) == len(log)


def test_the_best_on_wandb_is_chosen_on_the_validation_images():
    rows = Evaluations()
    for val, test in ((0.5, 0.9), (0.6, 0.3)):
        rows.add({"MLP": Scores([val], [test])}, 0.01, [], seconds=0, epochs=1)
    assert wandb_page.score_log(rows.rows)["Max_Accuracy/MLP"] == 0.3
    assert "Loss" not in wandb_page.score_log(rows.rows[:1])


@pytest.mark.parametrize(
    "ipc, force_save, pictures", [(49, False, True), (50, False, False), (50, True, True)]
)
def test_from_50_images_per_class_on_pictures_are_logged_only_when_forced(
    run, ipc, force_save, pictures
):
    args, run, state, data = run
    args.ipc, args.force_save = ipc, force_save
    log = show.evaluation(args, run, state, data)
    assert "Accuracy/MLP" in log and "Pixels" in log
    assert ("Synthetic_Images" in log) == ("Synthetic_Pixels" in log) == pictures


def test_images_are_logged_only_where_they_are_kept(run):
    args, run, state, data = run
    args.Iteration, args.force_save = 5000, True
    log = show.evaluation(args, run, state, data)
    assert "Accuracy/MLP" in log and "Pixels" not in log


@pytest.mark.parametrize(
    "mode, account, modes",
    [
        (None, True, ["online", "offline"]),
        (None, False, ["offline"]),
        ("online", True, ["online", "offline"]),
        ("offline", True, ["offline"]),
        ("disabled", False, ["disabled", "offline"]),
    ],
)
def test_wandb_is_online_only_with_an_account(monkeypatch, mode, account, modes):
    monkeypatch.setattr(wandb_page, "logged_in", lambda: account)
    assert list(wandb_page.modes_to_try(mode)) == modes


def test_asked_to_go_online_without_an_account_wandb_goes_offline_with_a_warning():
    with pytest.warns(UserWarning, match="nobody is logged in"):
        assert list(wandb_page.modes_to_try("online")) == ["offline"]


def test_a_page_that_fails_is_given_up_with_a_warning(monkeypatch, tmp_path):
    def fail(**_):
        raise OSError("no room\nfor wandb")

    monkeypatch.setattr(wandb_page.wandb, "init", fail)
    with pytest.warns(UserWarning, match="wandb cannot start in mode offline: no room"):
        dashboard = wandb_page.Dashboard(tmp_path, "Progress", "offline")
    dashboard.log({"Loss": 1.0}, step=0)
    dashboard.finish(Best_Iteration=0)
    assert dashboard.where_to_look() == "no wandb"


def test_without_a_network_pages_are_kept_on_disk_and_the_server_is_tried_once(
    monkeypatch, tmp_path
):
    """As on a compute node: logged in, but whoever asks the server waits for half a minute."""
    tried, stopped = [], []

    def init(mode, **_):
        tried.append(mode)
        if mode == "online":
            raise TimeoutError("no answer")
        assert stopped or tried == ["offline"]  # else: "run ID is in use"
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setattr(wandb_page, "logged_in", lambda: True)
    monkeypatch.setattr(wandb_page.wandb, "init", init)
    monkeypatch.setattr(wandb_page.wandb, "teardown", lambda: stopped.append(True))
    monkeypatch.setattr(wandb_page.Dashboard, "unreachable", False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.warns(UserWarning, match="cannot start in mode online: no answer"):
        first = wandb_page.Dashboard(tmp_path, "Epoch", None)
    second = wandb_page.Dashboard(tmp_path, "Epoch", None)  # and pytest would show another warning
    assert first.page and second.page
    assert tried == ["online", "offline", "offline"]


def on_screen(command, keys, seconds=30):
    """Those of `keys` that a command shows in a terminal of 180×50 characters."""
    process_id, terminal = pty.fork()
    if process_id == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 180, 0, 0))
    shown, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and not all(key in shown for key in keys):
        if select.select([terminal], [], [], 0.2)[0]:
            with contextlib.suppress(OSError):  # it has ended
                shown += os.read(terminal, 2**16)
    os.kill(process_id, signal.SIGKILL)
    os.waitpid(process_id, 0)
    os.close(terminal)
    return [key for key in keys if key in shown]


def test_a_run_on_disk_is_seen_in_the_terminal_by_the_command_that_is_printed(tmp_path):
    dashboard = wandb_page.Dashboard(
        tmp_path, "Progress", "offline", name="RUN", project="P", id="one"
    )
    for it in range(5):
        dashboard.log({"Progress": it, "Grand_Loss": 1 / (it + 1), "Synthetic_LR": 0.01}, step=it)
    dashboard.finish(Best_Iteration=3)
    line = dashboard.where_to_look()
    assert "offline" in line and "sync" in line
    viewer = re.search(r"to view: (\S+) leet (\S+);", line)
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert run.parent == Path(viewer[2])
    keys = [b"Grand_Loss", b"Synthetic_LR", b"RUN"]
    assert on_screen([viewer[1], "leet", str(run)], keys) == keys


def test_pages_go_where_wandbs_variable_says(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(wandb_page.wandb, "init", lambda dir, **_: folders.append(dir))
    dashboard = wandb_page.Dashboard(tmp_path, "Epoch", "offline")
    assert folders == [tmp_path / "elsewhere"]
    assert dashboard.folder == tmp_path / "elsewhere" / "wandb"


def test_a_page_that_fails_later_does_not_end_the_run(monkeypatch, tmp_path):
    class Page:
        def define_metric(self, *_, **__):
            pass

        def log(self, values, step):
            raise RuntimeError("the service died")

    monkeypatch.setattr(wandb_page.wandb, "init", lambda **_: Page())
    dashboard = wandb_page.Dashboard(tmp_path, "Progress", "offline")
    with pytest.warns(UserWarning, match="continuing without it: the service died"):
        dashboard.log({"Loss": 1.0}, step=0)
    dashboard.log({"Loss": 1.0}, step=1)  # and pytest would show a second warning


def test_the_summary_of_a_run_says_what_it_cost_and_reached(run):
    _, _, state, _ = run
    summary = wandb_page.run_summary(state.evaluations, 12.5, [None, 2e9, 3e9])
    assert summary["Best_Iteration"] == 1 and summary["Total_Seconds"] == 12.5
    assert summary["Best_Accuracy/MLP"] == pytest.approx(0.6)
    assert summary["Final_Accuracy/MLP"] == pytest.approx(0.4)
    assert summary["Final_Synthetic_LR"] == pytest.approx(0.012)
    assert summary["Peak_Memory"] == 3e9  # of the rank that needs most


def test_a_picture_is_written_whole_in_the_format_of_its_name(tmp_path):
    report.save_picture(tmp_path / "deep" / "a.png", Image.new("RGB", (2, 2)))
    content = (tmp_path / "deep" / "a.png").read_bytes()
    assert Image.open(io.BytesIO(content)).format == "PNG"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_pages_do_not_overwrite_each_other_where_a_variable_names_one(monkeypatch, tmp_path):
    ids = []
    monkeypatch.setattr(wandb_page.wandb, "init", lambda id, **_: ids.append(id))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    for _ in range(2):
        wandb_page.Dashboard(tmp_path, "Epoch", "offline")
    wandb_page.Dashboard(tmp_path, "Progress", "offline", id="of-a-run")
    assert len(set(ids)) == 3 and "mine" not in ids and ids[2] == "of-a-run"
