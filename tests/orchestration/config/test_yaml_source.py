"""YAML as plain data with places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.errors import ConfigError
from orchestration.config.yaml_source import Position, parse_yaml, read_yaml_file

TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=10)
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), TEXT
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(TEXT.filter(lambda key: key != "<<"), inner, max_size=4)
    ),
    max_leaves=20,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(JSON)
def test_json_is_read_as_json_reads_it(value: object) -> None:
    assert parse_yaml(json.dumps(value, ensure_ascii=False), "t").data == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.0e-3", 0.001),
        ("5E+2", 500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1f", 31),
        ("0o17", 15),
        ("012", 12),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("2001-01-01", "2001-01-01"),
        ("1:30", "1:30"),
        ("!!str 12", "12"),
        ("!!float 5", 5.0),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    data = parse_yaml(f"key: {text}", "t").data
    assert data == {"key": value}
    assert isinstance(data, dict)
    assert type(data["key"]) is type(value)


def test_every_key_and_value_has_its_place() -> None:
    source = parse_yaml("a: 1\nb:\n  c: [x,\n     y]\n  d: {e: 5}\nf:\n- g: 1\n", "t")
    assert source.position(("a",), at_key=True) == Position(1, 1)
    assert source.position(("a",)) == Position(1, 4)
    assert source.position(("b", "c"), at_key=True) == Position(3, 3)
    assert source.position(("b", "c", 1)) == Position(4, 6)
    assert source.position(("b", "d", "e")) == Position(5, 10)
    assert source.position(("f", 0, "g"), at_key=True) == Position(7, 3)
    assert source.place(("b", "d", "e")) == "t:5:10"


def test_a_place_that_is_not_in_the_text_is_that_of_the_key_around_it() -> None:
    source = parse_yaml("a: 1\nb:\n  c: 2\n", "t")
    assert source.position(("b", "missing")) == Position(2, 1)
    assert source.position(("nowhere", "at", "all")) == Position(1, 1)


def test_anchors_aliases_and_merges_are_written_out() -> None:
    source = parse_yaml(
        "base: &base {x: 1, y: {z: 2}}\nuse: *base\nmore: {<<: *base, x: 5}\nboth: {<<: [{x: 7}, *base]}", "t"
    )
    assert source.data == {
        "base": {"x": 1, "y": {"z": 2}},
        "use": {"x": 1, "y": {"z": 2}},
        "more": {"x": 5, "y": {"z": 2}},
        "both": {"x": 7, "y": {"z": 2}},
    }
    assert source.position(("more", "x")).line == 3
    assert source.position(("more", "y", "z")).line == 1, "a merged value stands where its anchor is"


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "t:3:1: the key 'a' was given before, in line 1; keep one"),
        ("a:\n  x: 1\n  x: 1", "t:3:3: the key 'x' was given before, in line 2; keep one"),
        ("a:\n\tb: 1", "t:2:1: the indentation has a tab"),
        ("a: [1, 2", "t:1:9: is not YAML"),
        ("a: 'x", "is not YAML: while scanning a quoted scalar"),
        ("a: b: c", "t:1:5: is not YAML: mapping values are not allowed here"),
        ("a: *nobody", "t:1:4: is not YAML: found undefined alias 'nobody'"),
        ("a: 1\nb: \x01", "t:2:4: holds a character that YAML does not allow"),
        ("a: &x [*x]", "t:1:4: an alias stands inside the value that it names"),
        ("a: &x {<<: *x}", "t:1:4: an alias stands inside the value that it names"),
        ("a: {<<: 3}", "t:1:9: '<<' merges a mapping"),
        ("a: !!python/object/apply:os.system [ls]", "t:1:4: the tag '!!python/object/apply:os.system' is not accepted"),
        ("a: !!python/name:os.system x", "t:1:4: the tag '!!python/name:os.system' is not accepted"),
        ("a: !own {b: 1}", "t:1:4: the tag '!own' is not accepted"),
        ("a: !!binary aGk=", "the tag '!!binary' is not accepted"),
        ("a: !!int abc", "t:1:4: 'abc' is not a whole number"),
        ("a: !!bool no", "t:1:4: 'no' is not true or false"),
        ("a: .inf", "t:1:4: '.inf' is not a finite number"),
        ("a: .nan", "t:1:4: '.nan' is not a finite number"),
        ("a: 1e999", "t:1:4: '1e999' is not a finite number"),
        ("a: " + "9" * 5000, "t:1:4: the number 999999999999... has more than 18 digits"),
        ("? [1, 2]\n: 3", "t:1:3: a key must be one word"),
        ("a: 1\n---\nb: 2", "t:2:1: a second document starts here"),
        ("%YAML 1.1\n---\na: no", "t:1:1: this is read as YAML 1.2; remove the line '%YAML 1.1'"),
        ("[" * 1000, "t:1: is nested too deeply"),
        (BOMB, "holds more than 10,000 values"),
    ],
)
def test_broken_yaml_is_one_line_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "t")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def place_or_message(text: str) -> Position | str:
    try:
        return parse_yaml(text, "t").position(())
    except ConfigError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@,? \n\t1.e\\~<\x00é"), max_size=40))
def test_any_text_is_data_or_a_config_error(text: str) -> None:
    answer = place_or_message(text)
    assert isinstance(answer, Position) or answer.startswith("t:")


def test_a_missing_file_is_named_with_its_likely_neighbour(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"swep\.yaml: there is no such file; did you mean 'sweep\.yaml'\?"):
        read_yaml_file(tmp_path / "swep.yaml")
    with pytest.raises(ConfigError, match=r"there is no such file$"):
        read_yaml_file(tmp_path / "nowhere" / "swep.yaml")


def test_a_folder_is_answered_with_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"is a folder; name the sweep file in it: sweep\.yaml"):
        read_yaml_file(tmp_path)


def test_a_file_in_another_encoding_is_pointed_at(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: 1\nname: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2:10: byte 0xe9 is not UTF-8"):
        read_yaml_file(path)


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    source = read_yaml_file(path)
    assert source.data == {"a": 1, "b": 2}
    assert source.position(("b",), at_key=True) == Position(2, 1)


def test_an_unreadable_path_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml_file(Path("a\x00b"))
