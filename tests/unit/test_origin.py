"""What outputs were made of: digests tell apart what differs and nothing else, files give back what was written."""

import itertools
from pathlib import Path

import pytest

from pipeline import origin
from pipeline.config import check_config

CONFIG = check_config({})
READING, FIT, SIMULATED = CONFIG["images"], CONFIG["fit"], CONFIG["simulated"]

#: Digests of each kind, of which no two are of the same thing.
DIFFERENT = {
    "config": [origin.config_digest(CONFIG), origin.config_digest(check_config({"shard_size": 7}))],
    "stack": [
        origin.stack_digest(section, start, stop)
        for section in (SIMULATED, SIMULATED | {"seed": 2})
        for start, stop in ((0, 5), (1, 5), (0, 6))
    ],
    "list": [
        origin.list_digest(["a", "b"], READING, 10, "seen"),
        origin.list_digest(["a"], READING, 10, "seen"),
        origin.list_digest(["a", "b"], READING | {"hdu": "all"}, 10, "seen"),
        origin.list_digest(["a", "b"], READING, 11, "seen"),
        origin.list_digest(["a", "b"], READING, 10, "seen later"),
    ],
    "part": [
        origin.part_digest("m", READING, FIT),
        origin.part_digest("n", READING, FIT),
        origin.part_digest("m", READING | {"hdu": "all"}, FIT),
        origin.part_digest("m", READING, FIT | {"scale": 2.0}),
    ],
    "rows": [origin.rows_digest(READING, FIT, "cpu"), origin.rows_digest(READING, FIT, "gpu")],
    "certificate": [
        origin.certificate_digest(["p", "q"], 10),
        origin.certificate_digest(["q", "p"], 10),
        origin.certificate_digest(["p", "q"], 20),
    ],
    "catalogue": [origin.catalogue_digest(["p"], CONFIG), origin.catalogue_digest(["q"], CONFIG)],
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_differs_has_another_digest(kind):
    digests = DIFFERENT[kind]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests)


@pytest.mark.parametrize(
    "digest",
    [lambda: origin.config_digest(CONFIG), lambda: origin.part_digest("m", READING, FIT)],
    ids=["config", "part"],
)
def test_another_version_makes_everything_again(monkeypatch, digest):
    before = digest()
    monkeypatch.setattr(origin, "__version__", "another")
    assert digest() != before


def test_the_order_of_keys_is_no_difference():
    assert origin.config_digest(dict(reversed(CONFIG.items()))) == origin.config_digest(CONFIG)


def test_a_list_comes_back_in_its_order(tmp_path):
    for names in ({}, {"b-1": "x", "a-2": "y"}):
        origin.write_list(tmp_path / "list", "of this", names)
        digest, found = origin.read_list(tmp_path / "list")
        assert (digest, list(found.items())) == ("of this", list(names.items()))


@pytest.mark.parametrize("text", [None, "", "f-1\nf-2\n", "# of this\nf-1\n", "# of this\nf-1 x y\n"])
def test_what_is_no_list_is_one_of_nothing(tmp_path, text):
    """Among them that of an earlier version, with names alone."""
    if text is not None:
        (tmp_path / "list").write_text(text)
    assert origin.read_list(tmp_path / "list") == ("", {})


def test_a_run_is_known_until_the_next(tmp_path):
    run = tmp_path / "run.json"
    assert origin.read_run(run) == {"config": "", "listing": ""}
    begun = []
    for config, listing in itertools.product(({"a": 1}, {"a": 2}), ("seen", "seen later")):
        origin.write_run(run, config, listing)
        assert origin.read_run(run) == {"config": origin.config_digest(config), "listing": listing}
        begun.append(origin.read_run(run))
        origin.check_run(run, begun[-1])
        for earlier in begun[:-1]:
            with pytest.raises(ValueError, match="another run has begun"):
                origin.check_run(run, earlier)
    for text in ("{", "[]", '{"config": "x"}', "7"):
        run.write_text(text)
        assert origin.read_run(run) == {"config": "", "listing": ""}


@pytest.mark.parametrize(
    "content", [None, b"", b"SIMPLE  =                    T" + b" " * 2850, b"x" * 5000 + b"DIGEST  = 'abc'"]
)
def test_what_was_not_simulated_has_no_digest(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "a.fits").write_bytes(content)
    assert origin.digest_in_header(tmp_path / "a.fits") == origin.digest_in_page(tmp_path / "a.fits") == ""
