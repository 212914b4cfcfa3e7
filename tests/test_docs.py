"""README and docs: links lead somewhere, and scripts take every command and run the README's."""

import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tokenize

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import make_flags  # found through the line above
import make_notebook

PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = [ROOT / "expert_trajectories.py", ROOT / "distillation.py"]
LINK = re.compile(r"\[[^]]*\]\(([^)]+)\)")
COMMAND = re.compile(r"python ((?:expert_trajectories|distillation)\.py(?: [^\n`\"\[]+|\\\n)*)")


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path):
    """The commands of both scripts in a file, as lists of words."""
    text = path.read_text().replace("\\\n", " ")
    return [shlex.split(found) for found in COMMAND.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_or_a_heading_that_is_there(page):
    targets = LINK.findall(page.read_text())
    for target in (target for target in targets if not target.startswith("https://")):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.search(r"^[A-Z0-9]{5,}$|\bTODO\b|\bTBD\b", page.read_text(), re.MULTILINE)


def test_every_page_and_picture_of_the_docs_is_linked():
    targets = [(page, target) for page in PAGES for target in LINK.findall(page.read_text())]
    linked = {(page.parent / target.partition("#")[0]).resolve() for page, target in targets}
    shown = [path for path in (ROOT / "docs").iterdir() if path.suffix not in (".py", "")]
    assert {path.resolve() for path in shown} <= linked


def test_the_tables_of_flags_are_those_of_the_parsers():
    assert make_flags.PAGE.read_text() == make_flags.page(), "run: python docs/make_flags.py"


EVERY_COMMAND = [words for path in [*PAGES, *SCRIPTS] for words in commands(path)]


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_every_command_is_taken_by_its_script(run_here, words, tmp_path):
    script, *given = words
    done = run_here(script, *given, "--device=nonsense", cwd=tmp_path)
    if "--resume" in given:  # the flags of the run, which is not there, come before all else
        assert "no run was started there" in done.stderr
    else:  # the first thing that is looked at after the flags
        assert done.returncode == 2 and "--device=nonsense" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def readers_folder(tiny_folder, tmp_path_factory):
    """The folder of a reader of the README, with the data that it speaks of, though few."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("DATA", "PICTURES"):
        shutil.copytree(tiny_folder, folder / name, ignore=shutil.ignore_patterns("*.pt"))
    others = shutil.ignore_patterns("run.json")  # which says that they are of all EuroSAT
    shutil.copytree(ROOT / "results", folder / "results", ignore=others)
    return folder


SHORT = {
    "expert_trajectories.py": "--num_experts=2 --train_epochs=7 --batch_train=20",
    "distillation.py": "--Iteration=1 --ipc=1 --lr_lr=1e-12 --num_eval=1 --epoch_eval_train=1",
}
# Whitening at 64×64 takes a minute: soak/test_full_size.py.
FEW = "--val_fraction=0.5 --model=MLP --zca=False --no-compile --wandb_mode=disabled"


def test_the_commands_of_the_readme_run_one_after_the_other(run_here, readers_folder):
    """Shortened by further flags, of which the last one counts; on the smallest network."""
    run = readers_folder / "logged_files" / "EuroSAT" / "RUN"
    told = [*commands(ROOT / "README.md"), *commands(ROOT / "docs" / "hyperparameters.md")]
    assert len(told) >= 9
    for script, *given in told:
        names = {flag.partition("=")[0] for flag in given}
        more = f"{SHORT[script]} {FEW}".split()
        if "--resume" in names:
            more = []
        elif script == "distillation.py" and "--evaluate" not in names and not run.exists():
            more += ["--run_name=RUN"]
        done = run_here(script, *given, *more, cwd=readers_folder)
        assert done.returncode == 0, (script, given, done.stderr)
    assert (readers_folder / "EXPORTED" / "images" / "Forest" / "0000.png").exists()


def test_the_lines_that_train_a_network_on_a_saved_set_run(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "502" in code and "499" in code  # epochs, as in evaluation
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)  # of the network
    names = {}
    exec(code.replace("502", "9").replace("499", "1"), names)
    assert all(p.isfinite().all() for p in names["network"].parameters())
    assert names["loss"] < 2.3  # that of guessing


def test_the_notebook_runs_and_holds_the_cells_that_make_it(readers_folder, monkeypatch):
    page = json.loads(make_notebook.PAGE.read_text())
    cells = ["".join(cell["source"]) for cell in page["cells"]]
    assert cells == make_notebook.CELLS, "run: python docs/make_notebook.py DATA"
    assert all(cell["outputs"] for cell in page["cells"][3::2])  # the first one prints nothing
    code = "\n".join(cells[1::2]).replace("EPOCHS = 1000", "EPOCHS = 4")
    code = code.replace('DATA = "data"', f"DATA = {str(readers_folder / 'DATA')!r}")
    code = code.replace("val_fraction=0.1", "val_fraction=0.5")  # of so few images
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    exec(code, names)
    assert names["alpha"] and len(names["right"]) == 10


def test_the_one_line_that_draws_toysat_runs(readers_folder):
    page = (ROOT / "docs" / "protocol.md").read_text()
    (line,) = re.findall(r'python (-c "[^"]*write_toysat[^"]*")', page)
    line = line.replace("per_class=100", "per_class=2")
    command = [sys.executable, *shlex.split(line)]
    path = {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=readers_folder, env=path, check=True)
    assert len(list((readers_folder / "DIR").glob("*/*.jpg"))) == 20


# --------------------------------------------------------------------------------------------------
# Docstrings

SOURCE = [*ROOT.glob("*.py"), *ROOT.glob("*/[!.]*.py")]
SOURCE = [path for path in SOURCE if path.parent.name not in ("tests", "docs", "quickstart")]


def docstrings():
    """Each docstring of the source: where it stands, and its text."""
    for path in SOURCE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(ROOT)}, {getattr(node, 'name', 'module')}", text


def test_docstrings_open_with_a_noun_or_a_verb():
    opened = re.compile(r"(What|How|Whether|Why|Those)\b")
    assert [place for place, text in docstrings() if opened.match(text)] == []


def test_names_in_docstrings_are_names_that_exist():
    """Each word of a name in backticks is one in the code, or in PyTorch's."""
    known = set(dir(torch)) | set(dir(torch.nn)) | set(dir(torch.nn.utils))
    known |= {"buffer", "py"}  # MTT's
    for path in SOURCE:
        code = list(tokenize.generate_tokens(io.StringIO(path.read_text()).readline))
        known |= {token.string for token in code if token.type == tokenize.NAME}
        known |= {
            word
            for token in code
            if token.type == tokenize.STRING and len(token.string) < 60
            for word in re.findall(r"\w+", token.string)
        }
        known.add(path.stem)
    unknown = []
    for place, text in docstrings():
        for quoted in re.findall(r"`([^`\n]+)`", text):
            if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", quoted):
                words = re.findall(r"[A-Za-z_]\w*", quoted.partition("(")[0])
                unknown += [(place, quoted) for word in words if word not in known]
    assert unknown == []
