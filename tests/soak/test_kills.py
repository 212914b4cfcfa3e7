"""Runs killed by SIGKILL at random moments of their whole time, resumed, and compared.

`tests/test_reliability.py` kills them before each of their renames instead, which is complete as
far as files go.
"""

import random
import shutil
import signal
import time

from outcomes import (
    assert_readable,
    assert_same,
    assert_same_experts,
    experts_by_seed,
    folder_of,
    hidden,
)

EXPERTS = "expert_trajectories.py"
DISTILLATION = "distillation.py"
KILLS = 20


def seconds_of(finish, script, flags, cwd):
    """The seconds from the start of an undisturbed run to its end."""
    begin = time.monotonic()
    finish(script, *flags, cwd=cwd)
    return time.monotonic() - begin


def kill_after(seconds, process):
    time.sleep(seconds)
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL), process.output()


def test_distillations_killed_at_random_moments_end_as_if_undisturbed(
    start, finish, specks_run, tmp_path
):
    reference = tmp_path / "reference"
    reference.mkdir()
    flags = [*specks_run, "--Iteration=30"]
    finish(DISTILLATION, *flags, cwd=reference)
    whole = seconds_of(finish, DISTILLATION, [*flags, "--run_name=other"], reference)
    moments = random.Random(0)
    resumed = 0
    for number in range(KILLS):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        process = start(DISTILLATION, *flags, cwd=cwd)
        kill_after(moments.uniform(0.1, 1) * whole, process)
        assert_readable(cwd)
        resumed += "resuming at iteration" in finish(DISTILLATION, *flags, cwd=cwd)
        assert_same(cwd, reference)
        assert not hidden(folder_of(cwd))
        shutil.rmtree(cwd)
    assert resumed >= KILLS / 4  # else the moments were none that tell anything


def test_experts_killed_at_random_moments_end_as_if_undisturbed(
    start, finish, specks_experts, specks_buffers, tmp_path
):
    flags = [*specks_experts, f"--buffer_path={tmp_path / 'reference'}"]
    whole = seconds_of(finish, EXPERTS, flags, tmp_path)
    moments = random.Random(1)
    kept = 0
    for number in range(KILLS):
        buffers = tmp_path / str(number)
        buffers.mkdir()
        flags = [*specks_experts, f"--buffer_path={buffers}"]
        process = start(EXPERTS, *flags, cwd=tmp_path)
        kill_after(moments.uniform(0.1, 1) * whole, process)
        assert_readable(buffers)
        before = experts_by_seed(buffers)
        kept += 0 < len(before) < 8
        assert f"{len(before)} of 8 experts are in" in finish(EXPERTS, *flags, cwd=tmp_path)
        assert_same_experts(buffers, specks_buffers)
        assert not hidden(buffers)
    assert kept >= KILLS / 4
