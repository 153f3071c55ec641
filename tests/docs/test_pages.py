"""Tables in the pages are those of the committed reports, and a table that is not is found and written anew."""

import pytest

from docs import pages
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT


def test_the_tables_of_all_pages_are_current():
    assert pages.write(check=True) == []


def test_every_table_of_every_page_is_registered():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        name = str(page.relative_to(ROOT))
        assert ("<!-- table " in page.read_text()) == bool(pages.TABLES.get(name)), name


def test_a_stale_table_is_found_and_written(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    (tmp_path / "docs").mkdir()
    page.write_text("before\n<!-- table law -->\n| 1 |\n<!-- end -->\nafter\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "TABLES", {"page.md": {"law": (r"| \2 |",)}})
    monkeypatch.setattr(pages, "table", str)
    assert pages.docs(["--check"]) == 1
    assert "| 1 |" in page.read_text()
    assert pages.docs([]) == 0
    assert page.read_text() == "before\n<!-- table law -->\n| \\2 |\n<!-- end -->\nafter\n"
    assert pages.docs(["--check"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == ["page.md: not current", "page.md: written", "all tables are current"]
    page.write_text("<!-- table laws -->\n<!-- end -->\n")
    with pytest.raises(InputError, match=r"page.md has the tables \['laws'\]; expected each of \['law'\]"):
        pages.write()
