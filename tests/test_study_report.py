"""The page of a study: what its first sentences say is what its tables say, and it stands alone."""

import html
import json
import re
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml

from studies import report, study_report
from studies.layers import merge
from studies.page import FigureBlock, Prose, TableBlock
from studies.runs import RunFolder
from studies.sections.answer import answer
from studies.sections.material import blocks_of, joined
from studies.sections.provenance import provenance
from studies.sections.sources import sources
from studies.spec import read_study
from studies.study_report import chance_levels, read_material, write_study_report
from tests.test_page import browse, needs_chromium
from tests.test_study import STUDY

SEEDS = 5


SHOWN = """<!doctype html><body><iframe src="index.html" width="390" height="900"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const links = [...page.querySelectorAll("a")].map((link) => link.getAttribute("href"));
  const seen = {
    answer: page.querySelector(".answer").innerText,
    wide: page.documentElement.scrollWidth,
    images: [...page.images].map((image) => image.naturalWidth),
    links: links.filter((link) => !link.startsWith("#")),
    named: [...page.querySelectorAll(".files")].every((part) => {
      const names = [...part.children].map((link) => link.textContent);
      return new Set(names).size === names.length;
    }),
  };
  document.body.append(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(seen) }));
});
</script>"""


@pytest.fixture
def write(tmp_path):
    """Write a study of two sources whose results are made up: `value(source, shots, seed)`."""

    def call(value, predictions=False, block=None, facts_of=lambda cell: {}, **changes):
        block = {**STUDY["blocks"][0], "shots": [1, "full"], "seeds": list(range(SEEDS)), **(block or {})}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**merge(STUDY, changes), "blocks": [block]}))
        study = read_study(path)
        for cell in study.cells:
            folder = RunFolder(tmp_path / "tiny" / cell.name)
            folder.path.mkdir(parents=True)
            facts = {"run": cell.name, "pretrain_seed": None, "n_test": 40, "seconds": 1.0, **cell.columns}
            facts |= facts_of(cell)
            rows = []
            if cell.kind == "transfer":
                number = value(facts["source"], facts["shots"], facts["seed"], *filter(None, [facts.get("source_n")]))
                per_class = [("auroc", "b", 0.7), ("auroc", "a", 0.6)]
                found = [("accuracy", None, number), *per_class]
                rows = [{**facts, "metric": name, "class_name": label, "value": v} for name, label, v in found]
                if predictions:
                    write_predictions(folder, number, cell.columns["seed"])
            folder.update_summary(state="finished", run=facts, rows=rows)
        return study, tmp_path

    return call


def write_predictions(folder, accuracy, seed):
    """Forty images of twenty patients, of which a share is right."""
    rng = np.random.default_rng(seed)
    parts = []
    for split in ("validation", "test"):
        labels = np.arange(40) % 2
        right = np.arange(40) < round(40 * accuracy)
        said = np.where(rng.permutation(right), labels, 1 - labels)
        logits = np.where(said[:, None] == np.arange(2), 1.0, -1.0) + rng.normal(0, 0.1, (40, 2))
        ids = [f"{split} {number}" for number in range(40)]
        groups = [f"{split} patient {number // 2}" for number in range(40)]
        columns = {"label": labels, "logit/a": logits[:, 0], "logit/b": logits[:, 1]}
        sex = np.where(np.arange(40) % 4 < 2, "F", "M")
        parts.append(pd.DataFrame({"id": ids, "group": groups, "split": split, **columns, "meta/sex": sex}))
    pd.concat(parts, ignore_index=True).to_parquet(folder.predictions)


def better(source, shots, seed):
    noise = 0.01 * np.random.default_rng([seed, len(source), len(shots)]).normal()
    return 0.5 + 0.02 * seed + noise + (0.2 if source == "near" and shots == "1" else 0.0)


def test_the_answer_is_what_the_corrected_tests_say(write):
    study, runs = write(better)
    sentences = answer(read_material(study, runs))
    assert re.fullmatch(
        r"Against scratch, near is higher in 1 of 2 comparisons \(by \+\d+\.\d points\) and not distinguishable in 1\.",
        sentences[0],
    )
    assert re.match(
        r"On far at 1 shot, near has the highest accuracy, 7\d\.\d ± \d\.\d %: above scratch by \+", sentences[1]
    )
    assert re.match(
        r"On far on the full training set, \w+ has the highest accuracy, .*: not distinguishable from .* points, p ",
        sentences[2],
    )
    assert "these weights only" in sentences[3]


def test_nothing_to_tell_apart_is_the_first_sentence(write):
    study, runs = write(lambda source, shots, seed: 0.5 + 0.01 * seed + (0.02 - 0.01 * seed) * (source == "near"))
    first, *_ = answer(read_material(study, runs))
    assert first.startswith("Nothing tells near from scratch: 2 comparisons, not distinguishable (by ")


def test_leaks_are_said_in_the_answer(write):
    study, runs = write(
        better, facts_of=lambda cell: {"guard": "LEAK: the source has seen test images (3 by id, of 40)"}
    )
    assert any("marked as leaking" in sentence for sentence in answer(read_material(study, runs)))


def test_the_baseline_is_the_reference_and_budgets_are_in_order(write):
    block = {"shots": [1, 5, 10], "sources": ["scratch", "zebra"]}
    study, runs = write(better, block=block, sources={"zebra": STUDY["sources"]["near"]})
    table = read_material(study, runs).comparisons  # by name, scratch would be compared with zebra
    assert table["source_reference"].unique().tolist() == ["scratch"]
    assert table["given"].tolist() == ["1", "5", "10"]
    assert (table["difference"].round(9) == (table["mean"] - table["mean_reference"]).round(9)).all()
    assert (table["low"] < table["difference"]).all()
    assert (table["difference"] < table["high"]).all()


def test_each_value_of_a_setting_has_a_map(write):
    def facts_of(cell):
        return {"dials": "a" if cell.columns["seed"] < SEEDS else "b"} if cell.kind == "transfer" else {}

    block = {"targets": ["far", "other"], "shots": [1], "seeds": list(range(2 * SEEDS))}
    targets = {"other": STUDY["targets"]["far"]}
    study, runs = write(better, block=block, facts_of=facts_of, targets=targets)
    material = read_material(study, runs)
    material.folder.mkdir(parents=True)
    found = sources(material)
    maps = [block for block in found.blocks if isinstance(block, FigureBlock)]
    assert [re.search(r"dials \w", block.caption)[0] for block in maps] == ["dials a", "dials b"]
    assert all("near to far +" in block.alt for block in maps)


def test_chance_is_that_of_the_metric_shown():
    frame = pd.DataFrame({"target": "t", "metric": "auroc", "class_name": list("abcd")})
    assert chance_levels(frame, {"t": "accuracy"}) == {"t": 0.25}
    assert chance_levels(frame, {"t": "test/mean_auroc"}) == {"t": 0.5}
    assert chance_levels(frame, {"t": "kappa"}) == {}


def test_one_seed_and_equal_runs_are_no_claims(write):
    study, runs = write(lambda source, shots, seed: 0.5 + 0.1 * (source == "near"))
    sentences = answer(read_material(study, runs))
    assert all("above scratch" not in sentence for sentence in sentences)
    assert "without a claim in 2 of 2 comparisons" in sentences[0]
    assert "no claim against scratch" in sentences[1]


def test_the_page_stands_alone_and_agrees_with_its_tables(write):
    study, runs = write(better, predictions=True, domains={"near": "photos", "far": "photos"})
    (line,) = write_study_report(study, runs)
    folder = runs / "tiny" / "report"
    assert str(folder / "index.html") in line
    page = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)
    for heading in ("Headline numbers", "Results by target", "What differs", "Cost", "Provenance"):
        assert heading in page
    pairs = pd.read_csv(folder / "comparisons.csv").set_index("given")
    assert pairs.loc["1", "verdict"] == "higher"
    assert pairs.loc["full", "verdict"] == "not distinguishable"
    headline = pd.read_csv(folder / "headline.csv")
    assert (headline["interval covers"].str.contains("patients")).all()  # the predictions are there
    near = headline[(headline["source"] == "near") & (headline["given"] == "1")].iloc[0]
    assert near["holds for"] == "these weights only"
    for name in ("summary.csv", "gains.csv", "comparisons.tex", "few_shot.pdf", "calibration_far.csv", "report.md"):
        assert (folder / name).is_file(), name
    assert "Reliability on far" in page
    assert "Subgroups" in page
    again = [path.stat().st_mtime_ns for path in (runs / "tiny" / "results.parquet", runs / "tiny" / "results.csv")]
    write_study_report(study, runs)
    assert again == [
        path.stat().st_mtime_ns for path in (runs / "tiny" / "results.parquet", runs / "tiny" / "results.csv")
    ]


@needs_chromium
def test_the_page_of_a_study_in_chromium(write):
    study, runs = write(better, domains={"near": "photos", "far": "photos"})
    write_study_report(study, runs)
    folder = runs / "tiny" / "report"
    (folder / "probe.html").write_text(SHOWN)
    document, console = browse(runs, f"file://{folder / 'probe.html'}", "--allow-file-access-from-files")
    assert console == []
    seen = json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", document, re.DOTALL)[1]))
    assert "Against scratch, near is higher in 1 of 2 comparisons" in seen["answer"]
    assert seen["wide"] <= 390
    assert seen["images"]
    assert all(seen["images"])
    assert {"./summary.csv", "./gains.tex", "./comparisons.csv", "./cost.tex"} <= set(seen["links"])
    assert all((folder / unquote(link)).is_file() for link in seen["links"])
    assert seen["named"]  # no two links of a table or figure say the same


def test_cells_without_a_result_are_named(write, monkeypatch):
    monkeypatch.setattr(study_report, "SECTIONS", (provenance,))  # the other sections are tested above
    monkeypatch.setattr(report, "write_figures", lambda *_: ())
    study, runs = write(better)
    cell = study.cells[-1]
    folder = runs / "tiny" / cell.name
    (folder / "summary.json").unlink()
    (folder / "failed.json").write_text(json.dumps({"cell": cell.name, "reason": "no memory", "attempts": 3}))
    write_study_report(study, runs)
    page = (runs / "tiny" / "report" / "index.html").read_text()
    assert cell.name in page
    assert "no memory" in page
    assert "Some cells have no result" in page


def test_markdown_becomes_blocks(tmp_path):
    table = "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
    prose, block = blocks_of(["Some words.", "What it shows.", table], tmp_path)
    assert isinstance(prose, Prose)
    assert isinstance(block, TableBlock)
    assert block.caption == "What it shows."
    assert block.frame.to_dict("records") == [{"a": "x|y", "b": "1"}]


def test_names_in_a_sentence():
    assert joined(["a"]) == "a"
    assert joined(["a", "b", "c"]) == "a, b and c"
    assert joined(list("abcdef")) == "a, b, c and 3 others"


def scaled(source, shots, seed, n=None):
    """An error that falls with the square root of the source."""
    noise = 0.002 * np.random.default_rng([seed, len(source), n or 0]).normal()
    return 1 - (0.8 if n is None else 8.0 * n**-0.5) + noise


def test_scale_has_a_law_and_an_interaction(write):
    sizes = [400, 800, 1600, 3200, 6400, 12800]

    def facts_of(cell):
        fraction = [size for size in sizes if cell.needs and f"fraction={size / 12800:g}" in cell.needs[0]]
        return {"source_n": fraction[0]} if fraction else {}

    vary = {"vary": {"data.init_args.fraction": [size / 12800 for size in sizes]}}
    domains = {"near": "photos", "far": "photos"}
    study, runs = write(scaled, facts_of=facts_of, sources={"near": vary}, domains=domains)
    write_study_report(study, runs)
    page = (runs / "tiny" / "report" / "index.html").read_text()
    assert "Scale of the source" in page
    assert "falls with scale" in page
    assert re.search(r"0\.(49|50|51) \[0\.\d\d,\s0\.\d\d\]", page)  # the exponent and its interval
    assert "too few: no source and target of two domains" in page


def test_ours_stand_beside_the_published(write):
    names = {"cifar100": STUDY["targets"]["far"]}
    net = {"resnetv2_152x4_bit": STUDY["architectures"]["net"]}
    block = {
        "sources": ["imagenet21k"],
        "targets": ["cifar100"],
        "architectures": ["resnetv2_152x4_bit"],
        "shots": [1],
        "seeds": [0, 1, 2],
    }
    study, runs = write(
        lambda source, shots, seed: 0.45 + 0.01 * seed,
        block=block,
        sources={"imagenet21k": STUDY["sources"]["near"]},
        targets=names,
        architectures=net,
        published="cherti2022",
    )
    write_study_report(study, runs)
    folder = runs / "tiny" / "report"
    (row,) = pd.read_csv(folder / "published.csv").query("metric == 'accuracy'").to_dict("records")
    assert (round(100 * row["published_mean"], 2), round(100 * row["published_sd"], 2)) == (41.63, 2.85)
    assert round(100 * row["mean"], 1) == 46.0
    assert row["standardised"] > 1
    assert "Beside the published results" in (folder / "index.html").read_text()
    assert (folder / "published.svg").is_file()
