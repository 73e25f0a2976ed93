"""``m2rnn track --compare``: every mixer with every seed, several runs at a time, one table and one plot of all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m2rnn.runs.cores import cores
from m2rnn.runs.display import Display
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import PLOT, RESULTS, run_folder, to_json, write_whole_file
from m2rnn.runs.side_by_side import Failure, side_by_side
from m2rnn.tasks.report import by_mixer, spread, training_line, write_plot
from m2rnn.tasks.run import Results, check_can_run, threads_of, track
from m2rnn.tasks.settings import RunSettings


def compare(
    settings: RunSettings,
    mixers: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    checkpoint_every: int = 100,
    minutes: float | None = None,
    display: Display | None = None,
) -> Results:
    """`track` each mixer with each seed in ``folder/mixer/seed-n``, ``jobs`` at a time, and put all into one
    results.json and one plot. By default ``jobs`` are as many as there are cores or GPUs.

    Runs are processes of their own, on the GPUs in turn if the device is ``cuda``. The results have all ``runs`` by
    name, for each mixer and length the mean, least and greatest accuracy over the seeds under ``summary``, and the
    runs that ``failed``, which the same call tries again. Interrupted, it goes on where each run stands.
    """
    for name, values in (("compare", mixers), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise SettingsError(f"{name} {','.join(map(str, values))!r}: expected one or more, each once")
    if jobs is not None and jobs < 1:
        raise SettingsError(f"jobs {jobs}: expected a whole number of at least 1")
    planned = {f"{mixer}/seed-{seed}": replace(settings, mixer=mixer, seed=seed) for seed in seeds for mixer in mixers}
    for run in planned.values():
        check_can_run(run)
    display = display or Display()
    options: dict[str, Any] = {"checkpoint_every": checkpoint_every, "minutes": minutes}
    with run_folder(folder, {**settings.as_json(), "mixer": list(mixers), "seed": list(seeds)}, overwrite):
        if overwrite:  # all now: what an interrupted comparison has not come to would be in the way of going on with it
            for name, run in planned.items():
                with run_folder(folder / name, run.as_json(), overwrite):
                    pass
        runs: dict[str, Results] = {}
        waiting = {}
        for name, run in planned.items():
            if (folder / name / RESULTS).exists():
                runs[name] = track(run, folder / name)
            else:
                waiting[name] = partial(track, run, folder / name, **options)
        failed: dict[str, Failure] = {}
        gpus = torch.cuda.device_count() if settings.device == "cuda" else 0
        threads = None if {threads_of(run) for run in planned.values()} != {1} else 1
        at_once = jobs or min(len(planned), gpus or cores())
        for name, outcome in side_by_side(waiting, at_once, display, gpus, threads):
            if isinstance(outcome, Failure):
                failed[name] = outcome
                display.note(f"{name} failed: {outcome.reason}")
            else:
                runs[name] = outcome
                display.note(f"{name}: {training_line(outcome)}")
        runs = {name: runs[name] for name in planned if name in runs}
        results: Results = {
            "runs": runs,
            "summary": summary(runs),
            "failed": {name: asdict(failure) for name, failure in failed.items()},
        }
        if runs:
            write_plot(folder / PLOT, list(runs.values()))
        write_whole_file(folder / RESULTS, to_json(results))
        return results


def summary(runs: Mapping[str, Results]) -> dict[str, Any]:
    """By mixer, length and positions, how accuracy is spread over the seeds."""
    return {
        mixer: {
            length: {positions: spread(same, length, positions) for positions in ("all", "last_quarter")}
            for length in same[0]["accuracy"]
        }
        for mixer, same in by_mixer(runs.values()).items()
    }
