"""Write the tables of README.md from the schema and the column definitions; ``--check``: say whether they agree."""

import argparse
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline import columns, config  # noqa: E402  (the package is used in place)

README = ROOT / "README.md"


def column_table() -> str:
    """The catalogue as a Markdown table; a column, its error and its bias share a row."""
    head = "| column | unit | meaning |\n| --- | --- | --- |\n"
    named = {column.name: column for column in columns.COLUMNS}
    rows = []
    for column in columns.COLUMNS:
        if column.name.endswith(columns.ENDINGS):
            continue
        group = [column, *(named[name] for end in columns.ENDINGS if (name := column.name + end) in named)]
        names = ", ".join(f"`{one.name}`" for one in group)
        units = "; ".join(dict.fromkeys(one.unit or "1" for one in group))
        rows.append(f"| {names} | {'' if units == '1' else units} | {_cell(column.description)} |\n")
    return head + "".join(rows)


def certificate_table() -> str:
    """The columns of the certificate as a Markdown table."""
    rows = [f"| `{column.name}` | {_cell(column.description)} |\n" for column in columns.CERTIFICATE]
    return "| column | meaning |\n| --- | --- |\n" + "".join(rows)


def flag_table() -> str:
    """The flags as a Markdown table."""
    head = "| bit | value | flag | set where |\n| --- | --- | --- | --- |\n"
    return head + "".join(f"| {f.bit} | {1 << f.bit} | `{f.name}` | {_cell(f.meaning)} |\n" for f in columns.FLAGS)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def rewritten(text: str) -> str:
    """``text`` with what stands between each pair of markers made anew; ValueError if a pair is missing."""
    tables = {
        "certificate table": certificate_table(),
        "config table": config.table(),
        "column table": column_table(),
        "flag table": flag_table(),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            msg = f"{README.name}: no section between <!-- {name} --> and <!-- end {name} -->"
            raise ValueError(msg)
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", text, count=1)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of date")
    old = README.read_text(encoding="utf-8")
    new = rewritten(old)
    if not parser.parse_args().check:
        README.write_text(new, encoding="utf-8")
        return 0
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "made anew"))
    return int(new != old)


if __name__ == "__main__":
    sys.exit(main())
