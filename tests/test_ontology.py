"""The label ontology against the real label tables: every token has a place, every label has positives."""

import ast
import re
from collections import Counter
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import yaml

from datamodules import ontology
from datamodules.chest_xray.nih import NIHChestXray14
from datamodules.errors import DataError

CONTENT = yaml.safe_load(ontology.FILE.read_text(encoding="utf-8"))
PADCHEST = CONTENT["sources"]["padchest"]
SHARED = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Pneumonia", "Pneumothorax"]


def real_table(name, **kwargs):
    # Found, not imported: importing the package costs seconds and only its tables are wanted.
    spec = find_spec("torchxrayvision")
    if spec is None:
        pytest.skip("torchxrayvision is not installed: it holds the real label tables")
    return pd.read_csv(Path(spec.origin).parent / "data" / name, dtype=str, keep_default_na=False, **kwargs)


@pytest.fixture(scope="module")
def cells():
    """PadChest's column "Labels", (160861,) strings; "nan" where a row has none."""
    return real_table("PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", usecols=["Labels"])["Labels"]


@pytest.fixture(scope="module")
def distinct(cells):
    """Each distinct cell that has labels: (its tokens, how many rows hold it)."""
    counts = cells[cells != "nan"].value_counts()
    return [({token.strip() for token in re.findall(r"'([^']*)'", cell)}, int(n)) for cell, n in counts.items()]


def rows_with(distinct, wanted):
    return sum(n for tokens, n in distinct if not tokens.isdisjoint(wanted))


def test_every_token_of_padchest_has_a_place(cells, distinct):
    assert (len(cells), int((cells == "nan").sum())) == (160861, 103)
    used = set().union(*(tokens for tokens, _ in distinct))
    known = ontology.token_labels("padchest")
    assert sorted(used - known.keys()) == [], "tokens of the table without a place"
    assert sorted(known.keys() - used) == [], "tokens that the table does not have"


def test_every_label_of_padchest_has_positives(cells, distinct, capsys):
    tokens, rule = ontology.tokens("padchest"), ontology.substrings("padchest")
    assert list(tokens) == list(rule) == ontology.labels("padchest")
    exact = {label: rows_with(distinct, found) for label, found in tokens.items()}
    counts = cells.str.lower().value_counts()
    hits = {label: counts.index.str.contains("|".join(map(re.escape, words))) for label, words in rule.items()}
    substring = {label: int(counts[hit].sum()) for label, hit in hits.items()}
    with capsys.disabled():
        print("\nPadChest: rows that are positive by exact tokens, and by the substrings of cherti2022")
        for label in tokens:
            print(f"  {label:28} {exact[label]:6d} {substring[label]:6d}")
    assert len(exact) == 27
    assert [label for label in tokens if not exact[label]] == []

    # The same counts row by row, from the file alone.
    slow_exact, slow_substring = Counter(), Counter()
    homes = [(label, set(found)) for label, found in PADCHEST["labels"].items()]
    searches = [(label, word) for label, words in CONTENT["cherti2022"]["padchest"].items() for word in words]
    for cell in cells:
        items = {item.strip() for item in ast.literal_eval(cell)} if cell != "nan" else set()
        slow_exact.update([label for label, found in homes if items & found])
        text = cell.lower()
        slow_substring.update({label for label, word in searches if word in text})
    assert exact == slow_exact
    assert substring == slow_substring


@pytest.mark.parametrize(
    ("label", "look_alike"),
    [
        ("Effusion", "pericardial effusion"),
        ("Emphysema", "subcutaneous emphysema"),
        ("Nodule", "pseudonodule"),
        ("Mass", "breast mass"),
        ("Tuberculosis", "tuberculosis sequelae"),
        ("Hilar Enlargement", "calcified adenopathy"),
    ],
)
def test_a_look_alike_is_no_positive(distinct, label, look_alike):
    words, exact = ontology.substrings("padchest")[label], set(ontology.tokens("padchest")[label])
    only = [tokens for tokens, _ in distinct if look_alike in tokens and tokens.isdisjoint(exact)]
    assert only, "the case does not occur"
    assert any(word in look_alike for word in words), "the paper's rule would not mistake it"
    inverse = ontology.token_labels("padchest")
    for tokens in only:
        assert label not in {positive for token in tokens for positive in inverse[token]}


def test_tokens_of_two_labels():
    inverse = ontology.token_labels("padchest")
    several = {token: found for token, found in inverse.items() if len(found) > 1}
    assert several == {
        "hydropneumothorax": ["Effusion", "Pneumothorax"],
        "consolidation": ["Consolidation", "Infiltration"],
        "air bronchogram": ["Consolidation", "Infiltration"],
    }
    assert inverse["normal"] == inverse[""] == []
    assert ontology.uninformative("padchest") == {"", "unchanged", "exclude", "suboptimal study"}


def test_labels_that_substrings_alone_would_find():
    tokens = ontology.tokens("padchest")
    assert tokens["Edema"] == ["pulmonary edema"]
    assert tokens["Fibrosis"] == ["pulmonary fibrosis"]
    assert tokens["Hernia"] == ["hiatal hernia"]
    assert {"pleural effusion", "loculated pleural effusion", "loculated fissural effusion"} <= set(tokens["Effusion"])


def test_nih_and_chexpert_columns():
    findings = set("|".join(real_table("Data_Entry_2017_v2020.csv.gz")["Finding Labels"].unique()).split("|"))
    assert ontology.token_labels("nih").keys() == findings
    assert ontology.labels("nih") == NIHChestXray14.class_names
    columns = list(real_table("chexpert_train.csv.gz", nrows=1))
    assert ontology.token_labels("chexpert").keys() == set(columns[columns.index("No Finding") :])
    assert ontology.tokens("mimic") == ontology.tokens("chexpert")
    assert ontology.labels("covidx") == ["COVID-19"]
    assert ontology.token_labels("tuberculosis") == {"0": [], "1": ["Tuberculosis"]}


def test_merges_of_the_paper():
    sources = [ontology.labels(name) for name in ("chexpert", "mimic", "nih", "padchest")]
    assert [len(names) for names in sources] == [13, 13, 14, 27]
    assert len(ontology.merge(sources[:2], "intersection")) == 13
    assert ontology.merge(sources[:3], "intersection") == SHARED
    assert ontology.merge(sources, "intersection") == SHARED
    assert len(ontology.merge(sources[:3], "union")) == 20  # 13 + 14 − 7
    assert len(ontology.merge(sources, "union")) == 31  # and PadChest's 27 − 14 of NIH − Fracture, Support Devices
    assert ontology.merge([["pleural effusion", "Zebra"], ["Effusion"]], "union") == ["Effusion", "Zebra"]
    assert ontology.merge([], "intersection") == []
    with pytest.raises(DataError, match="did you mean 'union'"):
        ontology.merge(sources, "unions")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Pleural Effusion", "Effusion"),
        ("pleural_effusion", "Effusion"),
        ("PLEURAL-THICKENING", "Pleural_Thickening"),
        ("Lung_Opacity", "Lung Opacity"),
        ("covid19", "COVID-19"),
        ("Pulmonary Oedema", "Edema"),
        ("Pleural Other", "Pleural Other"),
        ("Pericardial Effusion", "Pericardial Effusion"),
        ("", ""),
    ],
)
def test_canonical_names(spelling, name):
    assert ontology.canonical(spelling) == name


def test_names_come_in_dictionary_order():
    names = ["Pneumonia", "Pleural_Thickening", "pleural other", "Consolidation", "COVID-19"]
    order = ["Consolidation", "COVID-19", "Pleural Other", "Pleural_Thickening", "Pneumonia"]
    assert ontology.merge([names], "union") == order


@pytest.mark.parametrize("ask", [ontology.labels, ontology.tokens, ontology.token_labels, ontology.uninformative])
def test_unknown_source_names_the_nearest(ask):
    with pytest.raises(DataError, match="unknown source 'padchests'; did you mean 'padchest'"):
        ask("padchests")


def test_the_substring_rule_is_padchests_alone():
    with pytest.raises(DataError, match="unknown source 'nih'"):
        ontology.substrings("nih")


def test_what_is_handed_out_can_be_changed():
    ontology.tokens("nih")["Mass"].append("lump")
    ontology.substrings("padchest")["Mass"].clear()
    ontology.labels("nih").clear()
    assert ontology.tokens("nih")["Mass"] == ["Mass"]
    assert ontology.substrings("padchest")["Mass"] == ["mass"]
    assert len(ontology.labels("nih")) == 14
    assert ontology.version() == CONTENT["version"] == 1


def broken(change):
    content = deepcopy(CONTENT)
    change(content, content["sources"]["padchest"], content["cherti2022"]["padchest"])
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, p, r: p["unused"]["healthy"].append("nodule"), "'nodule' stands below both 'Nodule' and 'healthy'"),
        (lambda c, p, r: p["uninformative"].append("normal"), "'normal' stands below both 'healthy'"),
        (lambda c, p, r: p["labels"]["Mass"].append("mass"), "Mass lists a token twice"),
        (lambda c, p, r: p["labels"].update(Masses=["masses"]), "unknown label 'Masses'; did you mean 'Mass'"),
        (lambda c, p, r: p["labels"]["Mass"].append(1), "no text"),
        (lambda c, p, r: c["aliases"].update(Lump="Nodul"), "unknown label 'Nodul'; did you mean 'Nodule'"),
        (lambda c, p, r: c["aliases"].update(lung_lesion="Mass"), "the same name as 'Lung Lesion'"),
        (lambda c, p, r: c["labels"].append("covid19"), "the same name as 'COVID-19'"),
        (lambda c, p, r: c["cherti2022"].update(padchst={}), "unknown source 'padchst'"),
        (lambda c, p, r: r.update({"Lung Opacity": ["lung opacity"]}), "unknown label 'Lung Opacity'"),
        (lambda c, p, r: r["Mass"].append("Mass"), "Mass: the label's name comes first"),
        (lambda c, p, r: r["Support Devices"].pop(0), "Support Devices: the label's name comes first"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change, message):
    path = tmp_path / "ontology.yaml"
    path.write_text(yaml.safe_dump(broken(change)), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        ontology.read(path)
