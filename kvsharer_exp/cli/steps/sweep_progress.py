"""Show and log a ``sweep`` while it runs: a bar, and for every map an MLflow run and chart points.

The coordinator (`coordinator.run_search`) calls `SweepProgress.add` with every new result. If the
MLflow server is away, the search goes on. What MLflow has not got is delivered when it answers:
with a later result, in the end, or at the next start of the study, which has it all.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvsharer_exp.cli.config.schema import Config
from kvsharer_exp.cli.session.run_log import RunLog
from kvsharer_exp.reporting.plan_kinds import kv_percent, size_words
from kvsharer_exp.search.execution.base import Executor
from kvsharer_exp.search.front import BestSoFar, GrowingFront, bytes_rung, num_shared
from kvsharer_exp.search.paper.greedy import num_targets
from kvsharer_exp.search.spaces.registry import is_for_plans
from kvsharer_exp.search.study_store import StudyStore
from kvsharer_exp.tracking.patience import PATIENCE, MlflowAwayError
from kvsharer_exp.values.score_names import KL
from kvsharer_exp.values.text import clip
from kvsharer_exp.values.trial import TrialResult


class SweepProgress:
    """Follows the hypervolume, the best loss at the sizes asked for, and how many are screened out.

    Args:
        reference: the point from which the hypervolume is measured.
        executor: scores the maps; its workers are shown and kept as system metrics.
    """

    def __init__(
        self,
        config: Config,
        log: RunLog,
        store: StudyStore,
        reference: tuple[float, float],
        executor: Executor,
    ) -> None:
        self._executor, self._busy = executor, 0.0
        self._config, self._log, self._store = config, log, store
        self._found = store.results()
        self._known, self._started = len(self._found), log.seconds
        self._front = GrowingFront(self._found, reference)
        self._of_plans = is_for_plans(config.search_space.kind)
        self._best = BestSoFar(self._found, bytes_rung if self._of_plans else num_shared)
        self._flat = False
        self._waiting: deque[tuple[TrialResult, Mapping[str, float], int]] = deque()
        self._interrupted = False  # MLflow may have half a run
        self._wanted = config.study.n_trials if config.study.minutes is None else None
        self._bar = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=log.console,
            disable=config.quiet,
        )
        self._task = self._bar.add_task(
            "search", total=self._wanted, completed=len(self._found), state=""
        )

    @contextmanager
    def shown(self) -> Iterator[SweepProgress]:
        """Show the bar on the terminal for the block.

        First the results are logged that the study has and MLflow has not, because an earlier start
        was killed between the two, or because MLflow was away. In the end MLflow is waited for.
        """
        logged = self._store.map_runs()
        stored = zip(self._found, self._front.volumes, strict=True)
        for count, (result, volume) in enumerate(stored, start=1):
            if result.plan.digest not in logged:
                self._keep(result, {"hypervolume": volume}, count)
        with self._bar:
            yield self
        self._deliver(PATIENCE)
        if self._waiting:
            self._log.missing.append(f"{len(self._waiting)} trials")

    def add(self, result: TrialResult) -> bool:
        """Log a new result to MLflow and show it; returns whether the search may end."""
        self._found.append(result)
        volume, count = self._front.add(result), len(self._found)
        self._busy += result.seconds
        workers, spent = len(self._executor.workers), self._log.seconds - self._started
        charts = {
            "hypervolume": volume,
            "trials_per_minute": self._rate(),
            "system/workers": workers,
            "system/worker_utilization": min(1.0, self._busy / max(spent * workers, 1e-9)),
        }
        if self._best.add(result) and result.score is not None:
            charts[f"best_loss/{self._best.rung(result)}"] = -result.score
        self._keep(result, charts, count)
        self._bar.update(self._task, advance=1, state=self._state(volume))
        if not self._log.console.is_terminal:
            self._log.say(
                f"{count}{f'/{self._wanted}' if self._wanted else ''}  {size_words(result.plan)}  "
                f"{_short(result)}  {result.origin}  hypervolume {volume:.4f}"
            )
        patience = self._config.study.patience
        self._flat = patience is not None and self._front.is_flat(patience)
        if self._flat:
            self._log.say(f"the hypervolume is flat over {patience} maps: search ends")
        return self._flat

    def is_used_up(self, found: Sequence[TrialResult]) -> bool:
        """Whether the search ended below its number of maps, and not because it was flat."""
        return not self._flat and self._wanted is not None and len(found) < self._wanted

    def _keep(self, result: TrialResult, charts: Mapping[str, float], count: int) -> None:
        """Log the result and the points of its charts, behind those that wait for MLflow."""
        self._waiting.append((result, charts, count))
        self._deliver()

    def _deliver(self, seconds: float = 0.0) -> None:
        """Log what waits, in order; an MLflow server that is away is waited for so long."""
        tracker = self._log.tracker
        try:
            while self._waiting:
                if self._interrupted:
                    runs = self._store.map_runs().values()
                    with tracker.waiting(seconds):
                        tracker.close_left_open(self._store.key, self._log.run_id, runs)
                    self._interrupted = False
                try:
                    with tracker.waiting(0.0):  # a call made twice could make two runs
                        self._log_one(*self._waiting[0])
                except MlflowAwayError:
                    self._interrupted = True
                else:
                    self._waiting.popleft()
        except MlflowAwayError:
            return  # the client has said so

    def _log_one(self, result: TrialResult, charts: Mapping[str, float], count: int) -> None:
        """Log the result and the points of its charts, and tell the study when both are logged."""
        self._log.tracker.log_metrics(self._log.run_id, charts, step=count)
        run_id = self._log.tracker.log_trial(
            self._log.run_id,
            result,
            {"hypervolume": charts["hypervolume"]},
            name=f"{self._config.model.name} · {size_words(result.plan)} · {_short(result)}",
        )
        self._store.keep_map_run(result.plan, run_id)

    def _rate(self) -> float:
        """Maps scored per minute by this run."""
        return 60 * (len(self._found) - self._known) / (self._log.seconds - self._started)

    def _state(self, volume: float) -> str:
        stopped = sum(result.status == "screened_out" for result in self._found)
        failures = Counter(r.reason for r in self._found if r.status == "failed")
        failed = [f"{count} × {clip(reason, 24)}" for reason, count in failures.most_common(2)]
        words = [*self._losses(), f"hypervolume {volume:.3f}", f"{stopped} screened out", *failed]
        words.append(f"{self._rate():.1f}/min")
        minutes = self._config.search_minutes
        workers = self._executor.workers
        if len(workers) > 1:
            words.append(f"{sum(w.state == 'busy' for w in workers)}/{len(workers)} workers busy")
        if minutes is not None:
            left = minutes - (self._log.seconds - self._started) / 60
            words.append(f"{max(0.0, left):.0f} min")
        return " · ".join(words)

    def _losses(self) -> list[str]:
        """The best loss at some sizes, in words: ``best KL 0.25 at 40%, 0.01 at 75% of KV``."""
        best = [self._best.best[step] for step in self._shown()]
        if not best:
            return []
        name = "KL" if self._config.scoring.fitness_label == KL else "loss"
        if self._of_plans:
            sizes, of = [kv_percent(r.footprint.kv_fraction, fine=False) for r in best], "of KV"
        else:
            sizes, of = [str(r.num_shared) for r in best], "shared layers"
        losses = [f"{-(r.score or 0.0):.2g}" for r in best]
        pairs = ", ".join(map(" at ".join, zip(losses, sizes, strict=True)))
        return [f"best {name} {pairs} {of}"]

    def _shown(self) -> list[int]:
        """The rungs whose best loss the bar shows: those asked for, or of plans three of all."""
        known = sorted(self._best.best)
        if self._of_plans:
            return sorted({known[0], known[len(known) // 2], known[-1]}) if known else []
        layers = self._found[-1].plan.num_layers
        asked = {num_targets(ratio, layers) for ratio in self._config.compression.ratios}
        return [step for step in known if step in asked]


def size_of(result: TrialResult) -> str:
    """How much a map shares, like ``4/30 shared``; or how much KV a plan keeps and by what."""
    if result.sharing_map is not None:
        return f"{result.num_shared}/{result.plan.num_layers} shared"
    return f"{result.footprint.kv_fraction:.1%} of KV, {size_words(result.plan)}"


def _short(result: TrialResult) -> str:
    if result.status == "complete":
        return f"kl {result.scores[KL]:.3g}"
    return result.status.replace("_", " ")
