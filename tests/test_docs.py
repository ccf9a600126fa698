# SPDX-License-Identifier: MIT
"""Do the pages say what the code does? And are their links, anchors and formulas whole?"""
import doctest
import re
from pathlib import Path

import pytest

import ranet

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
READING_ORDER = ["README", "eq1", "eq2", "eq3", "eq4", "regions", "eq5", "eq6", "eq7", "eq8", "differences"]
EXPLAINED = {f"eq{n}": [name for name, f in vars(ranet).items() if (f.__doc__ or "").startswith(f"Eq. {n}:")]
             for n in range(1, 9)} | {"regions": ["connected_regions", "join_lone_pixels", "select_representatives"]}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$`([^`]+)`\$")
LINK = re.compile(r"""\]\(<?([^)>\s]+)|^\[[^\]]+\]: *(\S+)|(?:src|href)="([^"]+)""", re.MULTILINE)
PAIRS = (r"()\{", r"()\}"), (r"\\left()\b", r"\\right()\b"), (r"\\begin\{(\w+)", r"\\end\{(\w+)")
TESTS = {name for file in (ROOT / "test_ranet.py", *ROOT.glob("tests/*.py"))
         for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}


def prose(text):
    """A page without its code and its comments; the formulas stay."""
    text = FENCE.sub("", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    return re.sub(r"(\$`[^`]+`\$)|`[^`]+`", r"\1", text)


def run_python(text):
    """Runs a page's Python blocks in one namespace, those with >>> as doctests; returns what went wrong."""
    space, report, runner = {}, [], doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for _, language, code in FENCE.findall(text):
        if language == "python" and ">>> " in code:
            test = doctest.DocTestParser().get_doctest(code, space, "page", None, 0)
            runner.run(test, out=report.append, clear_globs=False)
            space.update(test.globs)                            # a doctest works on a copy
        elif language == "python":
            exec(compile(code, "page", "exec"), space)          # noqa: S102  what a page shows
    return "".join(report)


def anchors(text):
    """The anchors of a page: <a id="...">, and those that GitHub makes of its headings."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text).lower(), re.MULTILINE)
    return re.findall(r'<a id="([^"]+)"', text) + [re.sub(r"[^\w\- ]", "", x).replace(" ", "-") for x in headings]


def broken_links(text, folder):
    def whole(target):
        file, _, anchor = target.partition("#")
        path, there = folder / file, re.match(r"[a-z]+:", file)         # on another site
        return there or path.exists() and (not anchor or anchor in anchors(path.read_text() if file else text))
    return [target for target in map("".join, LINK.findall(prose(text))) if not whole(target)]


def broken_math(text):
    """Formulas that are not closed. A formula is a ```math block or $`...`$, and no other $ stands outside of code."""
    formulas = [code for _, language, code in FENCE.findall(text) if language == "math"] + FORMULA.findall(prose(text))
    broken = ["an odd number of ``` lines"] * (len(re.findall(r"^ *```", text, re.MULTILINE)) % 2)
    broken += re.findall(r".*\$.*", FORMULA.sub("", prose(text)))
    for formula in formulas:
        bare = re.sub(r"\\[{}\\]", "", formula)
        broken += [formula for pair in PAIRS if re.findall(pair[0], bare) != re.findall(pair[1], bare)]
    return broken


def broken_tables(text):
    """Tables without a head, as one that a blank line cuts in two, and rows with too many or too few cells."""
    bare, broken = FENCE.sub("", FORMULA.sub("x", re.sub(r"`[^`\n]*`", "x", text))), []
    for rows in (table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", bare, re.MULTILINE)):
        broken += [rows[0]] * (not re.fullmatch(r"[|: -]+-[|: -]+", "".join(rows[1:2])))
        broken += [row for row in rows if row.count("|") != rows[0].count("|")]
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_docs_page_runs_as_it_says_and_leads_somewhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    assert (run_python(text), broken_links(text, path.parent), broken_math(text)) == ("", [], [])
    assert broken_tables(text) == []
    for name, star in re.findall(r"\b(test_\w+)\b(?!\.py)(\*?)", text):
        assert any(t == name or star and t.startswith(name) for t in TESTS), f"no test {name}{star}"
    for name in re.findall(r"`(_\w+)`", text):
        assert hasattr(ranet, name), f"no {name} in ranet.py"


@pytest.mark.parametrize("page", EXPLAINED)
def test_docs_page_function_and_tests_name_each_other(page):
    text, before = (ROOT / "docs" / f"{page}.md").read_text(), READING_ORDER.index(page) - 1
    opening, nav = text.split("\n## ")[0], re.findall(r"\]\((\w+)\.md\)", text.strip().splitlines()[-1])
    row = "".join(re.findall(rf"^\|.*\]\({page}\.md[#)].*$", (ROOT / "docs/README.md").read_text(), re.MULTILINE))
    assert EXPLAINED[page] and "(explore.html)" in opening
    for function in EXPLAINED[page]:
        assert f"`{function}`" in opening and f"`{function}`" in row, "a row of the map"
        assert re.search(rf"(import|,) {function}\b", text), "an example calls it"
    for prefix in ["test_regions_", "test_lone_", "test_reps_"] if page == "regions" else [f"test_{page}_"]:
        assert f"`{prefix}*`" in row and any(name.startswith(prefix) for name in TESTS)
    assert nav == [READING_ORDER[before], "README", READING_ORDER[before + 2]], "previous, map, next"
    if page != "regions":
        assert text.startswith(f"# Eq. {page[2:]}: ") and re.findall(r"^## (.+)$", text, re.MULTILINE) == [
            "The equation", "Symbols", "The idea", "By hand", "Gradient"]


def test_docs_checks_notice_mistakes():
    page = "# A title\n\n```python\n>>> x = 1\n>>> x + 1\n2\n```\n\n$`a_{b}`$ [x](#a-title)\n\n```math\n\\frac12\n```\n"
    here = ROOT / "docs"
    assert (run_python(page), broken_links(page, here), broken_math(page)) == ("", [], [])
    assert run_python(page.replace("\n2\n", "\n3\n")) and run_python(page.replace("x + 1", "y + 1"))
    pytest.raises(NameError, run_python, "```python\nnothing\n```\n")
    for link in ("#no-title", "none.md", "eq1.md#none"):
        assert broken_links(page.replace("#a-title", link), here) == [link]
    for old, new in (("b}`$", "b`$"), ("`$", "`"), ("\\frac", "\\left( \\frac"), ("```\n\n$", "\n\n$"), ("$`a", "$$a")):
        assert broken_math(page.replace(old, new)), new
    rows = ["| a | $`|b|`$ |", "|---|---|", "| `|` | 2 |", "| 3 | 4 |", ""]
    assert broken_tables("\n".join(rows)) == []
    for wrong in (rows[:3] + [""] + rows[3:], rows[:2] + ["| 1 |"], rows[:1]):
        assert broken_tables("\n".join(wrong) + "\n"), wrong
