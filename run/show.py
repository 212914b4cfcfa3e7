"""The outputs of a run: its evaluations, curves and tables, and its page on Weights & Biases."""

from run import report, wandb_page
from run.scores import spread
from system import process, resources
from system.process import stop


def facts_about(inputs, settings):
    """Facts about a run with which results.json opens."""
    return {
        "settings": settings,
        "data": inputs.data.settings | {"classes": inputs.data.classes},
        "experts": len(inputs.experts.members),
        "experts_test_accuracy": inputs.experts.test_accuracies,
        "versions": process.versions(),
        "device": str(inputs.machine),
    }


def title_of(args):
    return f"{args.dataset}, {args.model}"


def status_of(state):
    """Say where a run stands, in a few words."""
    best = state.evaluations.best_accuracy
    return f"loss {state.losses[-1]:.4f}, α {state.current_alpha:.5f}, best {best:.1%}"


def is_kept(args, state):
    """Tell whether to keep the images: at a new best, every 1000 iterations, and at the end."""
    it = len(state.losses)
    return state.evaluations.latest_is_best or it % 1000 == 0 or it == args.Iteration


def evaluation(args, run, state, data, view=report.RGB_VIEW):
    """Print the latest evaluation, write its files, and return what Weights & Biases shows."""
    it, rows = len(state.losses), state.evaluations.comparable
    process.write_line(report.evaluation_lines(rows[-1]))
    images = state.images.cpu()
    pixels = data.to_pixels(images)
    of_each = len(state.label_syn) // len(images)
    names = [data.classes[label] for label in state.label_syn[::of_each].tolist()]
    title = f"{title_of(args)}, iteration {it}"
    shown = view.of_pixels(pixels)
    grid = report.draw_grid(shown, names, title, pixels=True)
    report.save_picture(run.folder / f"grid_{it:06d}.png", grid)
    log = wandb_page.score_log(rows)
    if is_kept(args, state):
        run.save_set(state, pixels if data.zca else None)
        log["Pixels"] = wandb_page.histogram(images)
        if not (args.ipc < 50 or args.force_save):
            return log
        if view.is_stretched:
            log |= wandb_page.band_log(images, shown, names, title)
        else:
            views = {"Synthetic": images} | ({"Reconstructed": pixels} if data.zca else {})
            log |= wandb_page.picture_log(views, names, title)
    return log


def curves_of(args, state, objective):
    """The curves of a run so far; `objective` is a row of OBJECTIVES."""
    return report.Curves(
        title=f"{title_of(args)}, images per class: {args.ipc}, seed {args.seed}",
        rows=state.evaluations.comparable,
        baselines=state.baselines,
        losses=state.losses,
        loss_title=objective.title,
        standstill=objective.standstill,
    )


def save_curves(args, run, state, objective):
    """Draw the curves of a run so far into its folder."""
    report.save_curves(run.folder / "curves.png", curves_of(args, state, objective))


def closing_table(run, state, data, experts):
    """Compare networks trained on real images, on the distilled ones, and on all real ones."""
    best = state.evaluations.best
    count = len(state.images)
    tiles = len(state.label_syn) // count
    of_tiles = f" of {tiles} tiles" if tiles > 1 else ""
    titles = [f"{count} random real images{of_tiles}", "the same, at the learned α"]
    rows = list(zip(titles, state.baselines))
    rows.append((f"{count} distilled images{of_tiles}", best))
    rows = [(title, row["syn_lr"], row["scores"]) for title, row in rows]
    accuracies = experts.test_accuracies
    if accuracies:
        reached = {"(experts)": f"{'':16}   {spread(accuracies)}"}
        rows.append((f"all {len(data.train[1])} images", None, reached))
    names = "images_best.pt, curves.png, animation.gif, results.json, ..."
    return (
        f"\nBest iteration: {best['iteration']}\n{report.closing_table(rows)}\n"
        f"Files: {run.folder} ({names})"
    )


def finish(args, run, state, objective, dashboard, facts):
    """Write everything, close the page, then mark the run as finished."""
    stop.release()  # a signal ends the process at once, and the next start does the rest
    memory = run.ranks.gather(resources.peak_memory(state.label_syn.device))
    if not run.ranks.is_first:
        return
    run.save_results(facts, state)
    save_curves(args, run, state, objective)
    report.save_animation(run.folder)
    # Last of all: if killed before this, the next start makes everything again.
    dashboard.finish(**wandb_page.run_summary(state.evaluations, state.seconds, memory))
    state.finished = True
    run.save(state)
    if len(memory) > 1:
        print(report.memory_line(memory), flush=True)


def open_dashboard(run, config, options):
    """The run's page on Weights & Biases, which rank 0 has.

    config   flags and settings of the run, which the page lists
    options  of the page, as `cli.flags.wandb_options` returns them
    """
    if not run.ranks.is_first:
        return wandb_page.Dashboard(run.folder, "Progress", "disabled")
    page = {"id": run.wandb_id, "name": run.folder.name, "config": config | process.versions()}
    return wandb_page.Dashboard(run.folder, "Progress", **options, **page)


def print_opening(run, state, experts, dashboard):
    """Print the first lines of a run."""
    count, it = len(state.images), len(state.losses)
    print(f"synthetic images: {count}, experts: {len(experts.members)}; results in {run.folder}")
    print(dashboard.where_to_look())
    if "alpha" not in state.learned:
        print(f"α is not learned: evaluation trains with --lr_teacher={state.alpha:g}")
    if state.seconds_before:
        print(f"resuming at iteration {it}; to start from scratch, remove {run.folder}")
    print(report.EVALUATION_HEADER, flush=True)
