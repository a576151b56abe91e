from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from common.machine.toml_lines import key_lines, line_of


def test_arrays_of_tables_count_their_elements() -> None:
    lines = key_lines('[[device]]\nkind = "nic"\n\n[[device]]\n# kind = "no"\nkind = "nvme"\n[[guest]]\nkind = "x"\n')
    assert lines["device", 0, "kind"] == 2
    assert lines["device", 1] == 4
    assert lines["device", 1, "kind"] == 6
    assert lines["guest", 0, "kind"] == 8


def test_what_looks_like_structure_inside_values_is_none() -> None:
    lines = key_lines(
        'a = """\n[b]\nc = 1 # \\"""\n"""  # [d]\n'  # lines 1 to 4
        "e = '''\n[[f]]'''\n"  # 5 and 6
        'g = "[h]" # i = 1\n'
        "j = [ # one\n  '#', [1.5,\n  1979-05-27 07:32:00]]\n"  # 8 to 10
        "k = 1\n"
    )
    assert set(lines) == {("a",), ("e",), ("g",), ("j",), ("j", 0), ("j", 1), ("j", 1, 0), ("j", 1, 1), ("k",)}
    assert (lines["e",], lines["g",], lines["j",], lines["j", 0], lines["j", 1, 1], lines["k",]) == (5, 7, 8, 9, 10, 11)


def test_dotted_and_quoted_keys_and_inline_tables() -> None:
    lines = key_lines('ram.size = 1\n"vi\\u006fmmu" . enabled = true\n\ndevice = [{ kind = "a" },\n { kind = "b" }]\n')
    assert lines["ram", "size"] == 1
    assert lines["viommu", "enabled"] == 2
    assert lines["device", 1, "kind"] == 5


def test_subtables_belong_to_the_last_element() -> None:
    lines = key_lines("[[a]]\n[a.b]\nx = 1\n[[a]]\n[[a.c]]\ny = 1\n[[a.c]]\ny = 1\r\n")
    assert lines["a", 0, "b", "x"] == 3
    assert lines["a", 1, "c", 1, "y"] == 8


def test_a_missing_key_is_on_the_line_of_what_surrounds_it() -> None:
    lines = key_lines("\n[[device]]\n\n[[device]]\n")
    assert line_of(lines, ("device", 1, "kind")) == 4
    assert line_of(lines, ("ram", "size")) == 1


VALUES = st.sampled_from(
    [
        "1",
        "-1.5e3",
        '"a"',
        '"#["',
        "'\"'",
        '"""\n[x]\ny = 1"""',
        "'''\n#'''",
        "[1,\n [2], # ]\n 3]",
        "{ p = 1, q = [2] }",
    ]
)
NAMES = st.sampled_from(["a", "b-1", "1", '"c d"', "'e.f'", '"\\""'])


@given(st.lists(st.tuples(NAMES, st.lists(st.tuples(NAMES, VALUES), unique_by=lambda pair: pair[0])), max_size=5))
def test_every_key_that_tomllib_finds_has_the_line_where_it_was_written(
    tables: list[tuple[str, list[tuple[str, str]]]],
) -> None:
    text = "# start\n"
    expected: list[int] = []
    for table, pairs in tables:
        text += f"\n [[ {table} ]] # table\n"
        for key, value in pairs:
            expected.append(text.count("\n") + 1)
            text += f"{key} = {value} # end\n"
    lines = key_lines(text)
    found = [
        lines[table, index, key]
        for table, elements in tomllib.loads(text).items()
        for index, element in enumerate(elements)
        for key in element
    ]
    assert sorted(found) == expected
