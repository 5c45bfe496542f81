"""What warm starts bring: searches of the demo model that begin with an earlier job's points.

    python -m bench.warm [--trials 30] [--before 60] [--seeds 0 1 2] [--dtype auto]

For each seed: an earlier search of another seed, then one that begins with its points and one that
does not. Prints the hypervolume (`jobs.fronts`) after a third of the trials and after all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean

import optuna
from optuna.trial import create_trial

from bench.search import prepare, scored
from engine.session import Session
from jobs import warm
from jobs.fronts import hypervolume
from jobs.spec.job import JobSpec
from jobs.spec.methods import MethodName
from jobs.tables import Trial
from jobs.trial_scores import front_of
from worker.samplers import sampler, startup
from worker.space import candidate_from, first, plain, space
from worker.warm import fitted, places

METHOD: MethodName = "mpoa"
OTHER = 1000  # added to a seed: that of the earlier search


def search(session: Session, trials: int, seed: int, before: Sequence[Trial] = ()) -> list[Trial]:
    """The trials of one search as the table holds them, begun with points of `before`."""
    layers = session.ready.anatomy.layers
    spec = JobSpec(model="demo", trials=trials, seed=seed)
    study = optuna.create_study(directions=["minimize"] * 2)
    table, usual = space(layers, METHOD), plain(layers, METHOD)
    numbers = places(spec.methods, trials)[METHOD]
    chosen = warm.chosen(front_of(before, spec.objectives), len(numbers))
    given = [("plain", usual)] + [(warm.ORIGIN, fitted(row.params, table, usual)) for row in chosen]
    rows = []
    for number in range(trials):
        asked, params, origin = None, dict[str, object](), "single_pass"
        if 0 < number <= len(given):
            origin, params = given[number - 1]
        elif number > 0:
            study.sampler = sampler(seed, startup(trials), number)
            asked = study.ask(table)
            origin, params = "sampler", asked.params
        edit = candidate_from(params, layers, METHOD) if params else first(layers, METHOD)
        found = scored(session, edit).scores
        values = (float(found.refusals), found.kl_first or 0.0)
        if asked is not None:
            study.tell(asked, values)
        elif params:
            study.add_trial(create_trial(values=values, params=params, distributions=table))
        rows.append(
            Trial(
                number=number,
                method=METHOD,
                origin=origin,
                params=params,
                values={},
                refusals=found.refusals,
                total=found.total,
                kl_first=found.kl_first,
                screened=False,
            )
        )
    return rows


def area(rows: Sequence[Trial]) -> float:
    """The hypervolume of trials."""
    return hypervolume([((r.refusals or 0) / (r.total or 1), r.kl_first or 0.0) for r in rows])


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--before", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    session, trials = Session(), arguments.trials
    prepare(session, dtype=arguments.dtype)
    head = f"cold, {trials // 3} | warm, {trials // 3} | cold, {trials} | warm, {trials}"
    print(f"| seed | {head} | earlier job, {arguments.before} |")
    print("|---|---|---|---|---|---|")
    table = []
    for seed in arguments.seeds:
        before = search(session, arguments.before, seed + OTHER)
        cold, begun = search(session, trials, seed), search(session, trials, seed, before)
        row = [area(rows[:n]) for n in (trials // 3, trials) for rows in (cold, begun)]
        table.append([*row, area(before)])
        print(f"| {seed} | " + " | ".join(f"{each:.4f}" for each in table[-1]) + " |", flush=True)
    means = " | ".join(f"{mean(column):.4f}" for column in zip(*table, strict=True))
    print(f"| mean | {means} |")


if __name__ == "__main__":
    main()
