"""What a sweep shows and logs while it runs: a bar, one MLflow run and one chart point a map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvsharer_exp.cli.commands.finals import search_minutes
from kvsharer_exp.cli.commands.session import Session
from kvsharer_exp.search.front import GrowingFront, best_per_size
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.search.study import results
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult


@contextmanager
def progress(
    session: Session, study: optuna.Study, reference: tuple[float, float]
) -> Iterator[Callable[[TrialResult], bool]]:
    """A bar with hypervolume, best loss at the sizes asked for, maps screened out and time left.

    Yields what logs each result to MLflow and says whether the search may end.
    """
    config, tracker = session.config, session.tracker
    found = list(results(study))
    front = GrowingFront(found, reference)
    sizes = [num_targets(ratio, session.num_layers) for ratio in config.compression.ratios]
    wanted = config.study.n_trials if config.study.minutes is None else None
    bar = Progress(
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=session.console,
        disable=config.quiet,
    )
    task = bar.add_task("search", total=wanted, completed=len(found), state="")
    known, started = len(found), session.seconds
    best = {size: result.score for size, result in best_per_size(found).items()}

    def rate() -> float:
        return 60 * (len(found) - known) / (session.seconds - started)

    def improved(result: TrialResult) -> dict[str, float]:
        """The loss of the best map of its size, when it is that."""
        size, before = len(result.sharing_map.targets), best.get(len(result.sharing_map.targets))
        if result.score is None or (before is not None and result.score <= before):
            return {}
        best[size] = result.score
        return {f"best_loss/{size}": -result.score}

    def state(volume: float) -> str:
        stopped = sum(result.status == "screened_out" for result in found)
        losses = [f"{n}: {-(best[n] or 0.0):.2g}" for n in sorted(set(sizes)) if n in best]
        words = [f"hv {volume:.3f}", *losses, f"{stopped} screened out"]
        minutes = search_minutes(config)
        if minutes is not None:
            left = minutes - (session.seconds - started) / 60
            words.append(f"{max(0.0, left):.0f} min")
        return " · ".join(words)

    def on_result(result: TrialResult) -> bool:
        found.append(result)
        volume = front.add(result)
        label = f"{config.model.name} · {size_of(result)} shared"
        run_id = tracker.log_trial(
            session.run_id, result, {"hypervolume": volume}, name=f"{label} · {_short(result)}"
        )
        # One attribute a trial: a dictionary of all would be written whole every time.
        study.set_user_attr(run_key(result.sharing_map), run_id)
        charts = {"hypervolume": volume, "trials_per_minute": rate(), **improved(result)}
        tracker.log_metrics(session.run_id, charts, step=len(found))
        bar.update(task, advance=1, state=state(volume))
        if not session.console.is_terminal:
            session.say(
                f"{len(found)}{f'/{wanted}' if wanted else ''}  {size_of(result)} shared  "
                f"{_short(result)}  {result.origin}  hypervolume {volume:.4f}"
            )
        flat = config.study.patience is not None and front.is_flat(config.study.patience)
        if flat:
            session.say(f"the hypervolume is flat over {config.study.patience} maps: search ends")
        return flat

    with bar:
        yield on_result


def run_key(sharing_map: SharingMap) -> str:
    """The study's attribute that holds the MLflow run of a map."""
    return f"run {sharing_map.digest}"


def size_of(result: TrialResult) -> str:
    return f"{len(result.sharing_map.targets)}/{result.sharing_map.num_layers}"


def _short(result: TrialResult) -> str:
    if result.status == "complete":
        return f"kl {result.scores['kl']:.3g}"
    return result.status.replace("_", " ")
