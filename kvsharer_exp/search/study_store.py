"""Keep what a study remembers beside the parameters of its trials, and read it back.

The `coordinator`, the command ``sweep``, the finals and the samplers use a study through
this module. Optuna keeps user attributes of a study as JSON. Their names and types are known
here only, and those of a trial in `stored_trial`. A study made by an earlier version of this
project has no attribute ``version``. It counts as version 1, whose attributes have not changed
since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from kvsharer_exp.search.candidates import Candidate
from kvsharer_exp.search.stored_trial import is_cached, result_of
from kvsharer_exp.values.actions.registry import read_action
from kvsharer_exp.values.errors import MALFORMED, InputError
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.record import typed
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.text import clip, shorten
from kvsharer_exp.values.trial import TrialResult

VERSION = 1
"""The version of the attributes below. Raise it when one of them changes its name or type."""

Seed = tuple[str, SharingMap | KVPlan]
"""A map or plan that a search starts from, with its origin in front."""

HeldOut = tuple[dict[str, float], dict[str, list[float]]]
"""A map's held-out scores by name, and [low, high] of those, and by `share_name` of shares."""

# The attributes of a study. The names of held-out scores are made below. Those of a map end in its
# digest, because one dictionary would be written whole every time; older finals are such a one.
_VERSION, _IDENTITY, _RUN, _FRONT = "version", "identity", "mlflow_run_id", "front"
_SEEDS, _FINALS, _CANDIDATES, _FITS = "seeds", "finals", "candidates", "fits"
_MAP_RUN, _UNDER_WAY, _KEY, _FINAL = "run ", "under way ", "key", "finals "


class KeptStudy(Protocol):
    """What is used of a study: an `optuna.Study`, or for one in a server a `ServedStudy`."""

    @property
    def study_name(self) -> str: ...

    @property
    def directions(self) -> Sequence[StudyDirection]: ...

    @property
    def user_attrs(self) -> dict[str, Any]: ...

    def get_trials(self, deepcopy: bool = True) -> list[FrozenTrial]: ...

    def add_trial(self, trial: FrozenTrial) -> None: ...

    def set_user_attr(self, key: str, value: Any) -> None: ...


def key_of(study: KeptStudy) -> str:
    """The key that a study in a server keeps (`StudyStore.key`); empty before it has one."""
    return str(study.user_attrs.get(_KEY, ""))


def keep_key(study: KeptStudy, key: str) -> str:
    """Have a study keep its key, for whoever opens it next; returns the key."""
    study.set_user_attr(_KEY, key)
    return key


class StudyStore:
    """The attributes of one study, which only this process uses (see `study.open_study`)."""

    study: KeptStudy

    def __init__(self, study: KeptStudy, key: str = "") -> None:
        """Take a study that this version can read.

        ``key``: a text that tells the study from every other one, also from one of the same name.
        A study that is made afresh has that of the old one, and a study in a server keeps its own.

        Raises:
            InputError: a newer version of this project wrote the study.
        """
        self.study = study
        self.key = key
        with self._reading("version"):
            held = typed(int, study.user_attrs.get(_VERSION, VERSION), _VERSION)
        if held > VERSION:
            raise InputError(
                f"study {study.study_name} has attributes of version {held}, this version reads "
                f"{VERSION}: use the newer kvsharer_exp that made it, or give another study.name"
            )

    @property
    def name(self) -> str:
        return self.study.study_name

    def results(self) -> list[TrialResult]:
        """The result of every distinct map that was scored, in the order of scoring."""
        with self._reading("results"):
            found = [result_of(trial) for trial in self.study.get_trials(deepcopy=False)]
        return [result for result in found if result is not None]

    def count_trials(self) -> int:
        """The number of all trials, also of those that met a known map."""
        return len(self.study.get_trials(deepcopy=False))

    def count_cached(self) -> int:
        """The number of trials that met a known map and cost nothing."""
        return sum(map(is_cached, self.study.get_trials(deepcopy=False)))

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Refuse to mix scores of two configurations in one study.

        ``identity``: what must be the same for two scores to be comparable, as JSON values.

        Raises:
            InputError: the study holds scores of another identity; the message says what differs.
        """
        held = self._get(_IDENTITY, dict[str, Any] | None, None)
        if held is None:
            self._set(_VERSION, VERSION)
            self._set(_IDENTITY, dict(identity))
            return
        if changed := _changed(held, identity):
            raise InputError(
                f"study {self.name} holds scores of another {', '.join(changed)}: "
                "give another study.name, or study.fresh=true to forget them"
            )

    def claim_fits(self, fingerprints: Mapping[str, str]) -> None:
        """Refuse to score plans with other stand-ins than those that the study was scored with.

        ``fingerprints``: by stand-in, as text, what identifies the numbers of its fit. The settings
        of fits are part of the identity that `claim` compares, but a cache that was emptied is
        filled with other numbers on another machine. An older study holds none, and takes these.

        Raises:
            InputError: the study was scored with other numbers; the message names a stand-in.
        """
        held = self._get(_FITS, dict[str, str], {})
        if other := sorted(key for key in held if fingerprints.get(key, held[key]) != held[key]):
            raise InputError(
                f"study {shorten(self.name, 30)} was scored with another fit of {other[0]} (of "
                f"{len(other)} in all): bring back the cache folder that it was made with, or give "
                "another study.name"
            )
        self._set(_FITS, {**held, **fingerprints})

    def under_way(self) -> list[tuple[str, dict[str, Any]]]:
        """The origin and the parameters of the trials that were under way last.

        Some of them may have ended since.
        """
        held = self.study.user_attrs.items()
        kept = sorted((key, value) for key, value in held if key.startswith(_UNDER_WAY))
        with self._reading("trials under way"):
            return [
                (typed(str, origin, key), typed(dict[str, Any], params, key))
                for key, (origin, params) in kept
            ]

    def keep_under_way(self, slot: int, origin: str, params: Mapping[str, Any]) -> None:
        """Keep a trial that begins, in the place ``slot`` of one that has ended."""
        self._set(f"{_UNDER_WAY}{slot:06}", [origin, dict(params)])

    @property
    def mlflow_run_id(self) -> str:
        """The id of the MLflow run of the sweep; empty before there is one."""
        return self._get(_RUN, str | None, None) or ""

    @mlflow_run_id.setter
    def mlflow_run_id(self, run_id: str) -> None:
        self._set(_RUN, run_id)

    def map_runs(self) -> dict[str, str]:
        """By the digest of a map, the id of its MLflow run."""
        held = self.study.user_attrs.items()
        return {k.removeprefix(_MAP_RUN): str(run) for k, run in held if k.startswith(_MAP_RUN)}

    def map_run(self, plan: KVPlan) -> str:
        """The id of the MLflow run of a map; empty if it has none."""
        return self._get(_MAP_RUN + plan.digest, str, "")

    def keep_map_run(self, plan: KVPlan, run_id: str) -> None:
        """Keep the id of the MLflow run of a map."""
        self._set(_MAP_RUN + plan.digest, run_id)

    @property
    def front_runs(self) -> list[str]:
        """The MLflow runs that were last marked as members of the front."""
        return self._get(_FRONT, list[str], [])

    @front_runs.setter
    def front_runs(self, run_ids: Sequence[str]) -> None:
        self._set(_FRONT, list(run_ids))

    @property
    def seeds(self) -> list[Seed] | None:
        """The maps that the search starts from; None before they are made."""
        kept = self._get(_SEEDS, list[list[str]] | None, None)
        if kept is None:
            return None
        with self._reading(_SEEDS):
            return [(origin, KVPlan.parse(text)) for origin, text in kept]

    @seeds.setter
    def seeds(self, seeds: Sequence[Seed]) -> None:
        self._set(_SEEDS, [[origin, str(plan)] for origin, plan in seeds])

    @property
    def candidates(self) -> list[Candidate] | None:
        """What a search of plans may do at each layer; None before it was measured."""
        kept = self._get(_CANDIDATES, list[list[Any]] | None, None)
        if kept is None:
            return None
        found = []
        with self._reading(_CANDIDATES):
            for layer, text, error, *sizes in kept:
                action = read_action(text, typed(int, layer, "layer"))
                assert action is not None
                error, sizes = typed(float, error, "error"), typed(list[int], sizes, "bytes")
                found.append(Candidate(layer, action, error, *sizes))
        return found

    @candidates.setter
    def candidates(self, candidates: Sequence[Candidate]) -> None:
        kept = [
            [c.layer, c.action.text(c.layer), c.error, c.kv_bytes, c.full_bytes] for c in candidates
        ]
        self._set(_CANDIDATES, kept)

    @property
    def finals(self) -> dict[str, list[float]]:
        """By the digest of a map, its losses on the windows of the finals so far."""
        held = self.study.user_attrs
        each = {k.removeprefix(_FINAL): v for k, v in held.items() if k.startswith(_FINAL)}
        with self._reading(_FINALS):
            return typed(dict[str, list[float]], {**held.get(_FINALS, {}), **each}, _FINALS)

    def keep_final(self, plan: KVPlan, losses: Sequence[float]) -> None:
        """Keep all losses of a map in the finals so far, for `finals`."""
        self._set(_FINAL + plan.digest, list(losses))

    def held_out(self, key: str) -> dict[str, HeldOut]:
        """By the digest of a map, its held-out scores under the settings that ``key`` names."""
        kept = self._get(f"report {key}", dict[str, list[Any]], {})
        with self._reading("held-out scores"):
            kinds = dict[str, float], dict[str, list[float]]
            return {
                digest: (typed(kinds[0], scores, digest), typed(kinds[1], intervals, digest))
                for digest, (scores, intervals) in kept.items()
            }

    def keep_held_out(self, key: str, scores: Mapping[str, HeldOut]) -> None:
        """Keep held-out scores for `held_out`, in place of those kept under ``key`` before."""
        self._set(f"report {key}", dict(scores))

    def _get(self, name: str, kind: Any, default: Any) -> Any:
        """The attribute ``name``, which has to be of the type ``kind``."""
        with self._reading(name):
            return typed(kind, self.study.user_attrs.get(name, default), name)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Refuse, with an `InputError`, a study that holds something else than was written."""
        try:
            yield
        except MALFORMED as error:
            reason = shorten(error, 40) or type(error).__name__
            raise InputError(
                f"study {shorten(self.name, 30)} holds damaged {clip(what, 20)} ({reason}): "
                "give another study.name, or study.fresh=true to forget them"
            ) from error

    def _set(self, name: str, value: Any) -> None:
        self.study.set_user_attr(name, value)


def _changed(held: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ; of a section that differs in a setting or two, these."""
    names: list[str] = []
    for key in {**held, **identity}:
        old, new = held.get(key), identity.get(key)
        inner: list[str] = []
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = [f"{key}.{k}" for k in {**old, **new} if old.get(k) != new.get(k)]
        if old != new:
            names += inner if 0 < len(inner) <= 2 else [key]
    return names
