"""Every valid map survives parse, print and JSON; every invalid one is refused with its reason."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.plan_files import PlanFileError
from kvsharer_exp.values.sharing_map import SharingMap, SharingMapError


@st.composite
def sharing_maps(draw: st.DrawFn, max_layers: int = 12) -> SharingMap:
    sources: list[int] = []
    for layer in range(draw(st.integers(1, max_layers))):
        owners = [i for i, source in enumerate(sources) if source == i]
        sources.append(draw(st.sampled_from([*owners, layer])))
    return SharingMap(tuple(sources))


@given(sharing_maps())
def test_round_trips(sharing_map: SharingMap) -> None:
    assert SharingMap.parse(str(sharing_map)) == sharing_map
    assert SharingMap.parse(list(sharing_map.kv_source_layers)) == sharing_map
    assert SharingMap.parse(json.dumps(sharing_map.kv_source_layers)) == sharing_map
    assert SharingMap.from_json(sharing_map.to_json()) == sharing_map
    assert SharingMap.parse(sharing_map) is sharing_map


@given(sharing_maps())
def test_owners_and_targets_divide_the_layers(sharing_map: SharingMap) -> None:
    assert sorted(sharing_map.owners + sharing_map.targets) == list(range(sharing_map.num_layers))
    assert sharing_map.owners[0] == 0
    assert sharing_map.compression == len(sharing_map.targets) / sharing_map.num_layers
    assert len(sharing_map.digest) == 12
    assert int(sharing_map.digest, 16) >= 0


@given(sharing_maps(), st.data())
def test_share_gives_a_valid_map_in_which_the_target_reads_the_source(
    sharing_map: SharingMap, data: st.DataObject
) -> None:
    if sharing_map.num_layers == 1:
        return
    target = data.draw(st.integers(1, sharing_map.num_layers - 1))
    source = data.draw(st.integers(0, target - 1))
    shared = sharing_map.share(target, source)
    assert shared.kv_source_layers[target] == shared.kv_source_layers[source]
    assert target in shared.targets
    assert set(shared.targets) == {*sharing_map.targets, target}


def test_chains_are_resolved_as_in_the_paper() -> None:
    # 5 reads 3, later 3 reads 1: 5 then reads 1.
    assert str(SharingMap.identity(6).share(5, 3).share(3, 1)) == "0_1_2_1_4_1"
    # A source that already reads another layer stands for its owner.
    assert str(SharingMap.identity(6).share(3, 1).share(5, 3)) == "0_1_2_1_4_1"


def test_reads_a_file(tmp_path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"kv_source_layers": [0, 0, 2], "note": "more keys are fine"}')
    assert SharingMap.parse(path) == SharingMap.parse(str(path)) == SharingMap((0, 0, 2))


FRONT = [{"kv_source_layers": [0, 1, 1], "digest": "d"}, {"kv_source_layers": [0, 0, 0]}]


@pytest.mark.parametrize(
    "content", [FRONT, {"front": FRONT}, {"command": "search", "results": FRONT}]
)
def test_one_line_reads_a_map_of_a_front(tmp_path, content) -> None:
    path = tmp_path / "front.json"
    path.write_text(json.dumps(content))
    assert SharingMap.parse(f"{path}:1") == SharingMap((0, 1, 1))
    assert SharingMap.parse(f"{path}:2") == SharingMap((0, 0, 0))
    several = r"front\.json has maps of 1, 2 shared layers: give one of these numbers behind it"
    for written in (path, str(path), f"{path}:0"):
        with pytest.raises(PlanFileError, match=several):
            SharingMap.parse(written)
    with pytest.raises(PlanFileError, match="does not say how much KV its plans keep"):
        SharingMap.parse(f"{path}:0.5")


def test_a_file_of_one_map_needs_no_number_and_holds_no_other(tmp_path) -> None:
    for content in ({"kv_source_layers": [0, 0]}, [{"kv_source_layers": [0, 0]}], [0, 0]):
        path = tmp_path / "one.json"
        path.write_text(json.dumps(content))
        assert SharingMap.parse(path) == SharingMap.parse(f"{path}:1") == SharingMap((0, 0))
        for choice in ("3", "0.5") if content != [{"kv_source_layers": [0, 0]}] else ():
            with pytest.raises(PlanFileError, match=f"one.json has one plan: leave out :{choice}"):
                SharingMap.parse(f"{path}:{choice}")


def test_identity_shares_nothing() -> None:
    assert SharingMap.identity(4).targets == ()
    assert SharingMap.identity(4).compression == 0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "empty"),
        ([], "empty"),
        ("0_1_3", "comes after it"),
        ("1_1", "comes after it"),
        ("0_0_1", "does not own its KV"),
        ("0_-1", "negative"),
        ([0, 0.0], "not an integer"),
        ([0, True], "not an integer"),
        ([0, "0"], "not an integer"),
        ([0, None], "not an integer"),
        ("0_x", "neither"),
        ("0__1", "neither"),
        ("0_1.5", "neither"),
        ("[0, 1", "not JSON"),
        ('{"sources": [0]}', "no key kv_source_layers"),
        ('{"plan": "0_a"}', "holds a KV plan, 0_a: give it with plan= instead of"),
        ('{"plan": "0_a", "kv_source_layers": null}', "holds a KV plan, 0_a: give it with plan="),
        ('{"kv_source_layers": "0_1"}', "not a list"),
        (7, "not a sequence"),
    ],
)
def test_invalid_maps_are_refused_with_their_reason(value: object, reason: str) -> None:
    with pytest.raises(SharingMapError, match=reason) as refused:
        SharingMap.parse(value)  # type: ignore[arg-type]
    assert isinstance(refused.value, InputError)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 200


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanFileError, match="cannot be read"):
        SharingMap.parse("missing.json")


@pytest.mark.parametrize(("target", "source"), [(0, 0), (1, 2), (2, 2), (5, 0), (1, -1)])
def test_share_refuses_what_cannot_be(target: int, source: int) -> None:
    with pytest.raises(SharingMapError):
        SharingMap.identity(4).share(target, source)
