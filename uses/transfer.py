"""The task `transfer`: other networks than the one that the images were made for.

Cross-architecture generalisation (Zhao et al. 2021, arXiv 2006.05929, section 4.1), with α chosen
for each network, since networks may diverge at the α that was learned for another.
"""

from dataclasses import dataclass

import numpy as np

from run.scores import Scores, spread
from system import process
from uses.study import Outcome, labelled_by_experts, new_figure, random_images


@dataclass(frozen=True)
class Result:
    """Networks trained on a set."""

    trained_on: str
    network: str
    syn_lr: float | None  # α; None: a kernel machine, which has none
    scores: Scores


def compare_networks(study):
    """Train each network on the set, and on as many random real images."""
    random = random_images(study)
    sets = [study.distilled, random]
    if study.experts.members:
        sets.append(labelled_by_experts(study, random))
    results = [result for each in sets for result in results_on(each, study.key)]
    table = table_of(results)
    if not study.experts.members:
        table += "\n\nThe experts' labels are left out: --buffer_path has no experts of --model."
    rows = [vars(result) | {"scores": vars(result.scores)} for result in results]
    return Outcome(table, {"rows": rows}, bars(results))


def results_on(training_set, key):
    """A `Result` of each network on a set, each printed as it is there."""
    process.write_line(f"\n{training_set.title}: α on validation images")
    results = []
    alphas = training_set.alphas(key)
    for name in training_set.evaluator.pool:
        alpha = alphas.get(name)
        scores = training_set.of_network(name, alpha).scores(key)
        process.write_line(f"{name:12} α = {shown(alpha):7} test {spread(scores.test)}")
        results.append(Result(training_set.title, name, alpha, scores))
    return results


def shown(alpha):
    """A step size as text; None: there is none."""
    return "–" if alpha is None else f"{alpha:g}"


def by_network(results):
    """The results of each network, by its name."""
    names = dict.fromkeys(result.network for result in results)
    return {name: [each for each in results if each.network == name] for name in names}


def table_of(results):
    """Test accuracy and α: a row for each network, a column for each set."""
    titles = dict.fromkeys(result.trained_on for result in results)
    lines = [f"{'test accuracy':14} " + "   ".join(f"{title:28}" for title in titles)]
    for name, row in by_network(results).items():
        cells = (f"{spread(r.scores.test):16}  α {shown(r.syn_lr):8}" for r in row)
        lines.append(f"{name:14} " + "   ".join(f"{cell:28}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def bars(results):
    """A Figure of test accuracies: a group of bars for each network, a colour for each set."""
    figure = new_figure(9, 4)
    axis = figure.subplots()
    titles = list(dict.fromkeys(result.trained_on for result in results))
    names = list(by_network(results))
    width = 0.8 / len(titles)
    for number, title in enumerate(titles):
        test = [100 * np.array(r.scores.test) for r in results if r.trained_on == title]
        place = np.arange(len(names)) + (number - (len(titles) - 1) / 2) * width
        heights, errors = [t.mean() for t in test], [t.std() for t in test]
        axis.bar(place, heights, width, yerr=errors, label=title, capsize=3)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("test accuracy, %")
    axis.legend(fontsize="small")
    return figure
