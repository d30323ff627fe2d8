import re

import numpy as np
import pandas as pd
import pytest

from studies.tables import alignment, cell_text, escape_latex, to_latex, write_table


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "source_n": ["50 % of A & B", "NIH_14 #1", None],
            "accuracy": ["41.6 ± 2.9", "< 0.1", ""],
            "gain": ["+3.0 [−2.0, 8.0]", "−1.5", "–"],
            "verdict": ["higher", "not distinguishable", "no claim"],
            "images": pd.array([1_281_167, 900, None], dtype="Int64"),
            "p": [0.0000123456, np.nan, -0.25],
        }
    )


def test_text_of_cells(frame):
    text = cell_text(frame)
    assert text["images"].tolist() == ["1,281,167", "900", "–"]
    assert text["p"].tolist() == ["1.235e−05", "–", "−0.25"]
    assert text["source_n"].tolist() == ["50 % of A & B", "NIH_14 #1", "–"]
    assert cell_text(pd.DataFrame({"a": [12345.6, np.inf], "b": [True, False]})).to_numpy().tolist() == [
        ["12,346", "True"],
        ["inf", "False"],
    ]
    typed = pd.DataFrame({"a": pd.array(["x", None], dtype="string[pyarrow]"), "b": pd.Categorical(["y", None])})
    assert cell_text(typed).to_numpy().tolist() == [["x", "y"], ["–", "–"]]


def test_numbers_stand_right_and_names_left(frame):
    assert alignment(frame) == ["left", "right", "right", "left", "right", "right"]
    assert alignment(frame, {"gain": "left", "verdict": "right"})[2:4] == ["left", "right"]
    assert alignment(pd.DataFrame({"5": ["1", "2"], "6": ["1", "two"]})) == ["left", "left"]
    assert alignment(pd.DataFrame([[1, 2, 3]], columns=["a", "a", "b"])) == ["left", "right", "right"]


def test_latex_has_booktabs_and_no_bare_sign(frame):
    text = to_latex(frame, "Gain over A_B, 95 % interval")
    assert text.splitlines()[0] == r"% \usepackage{booktabs}"
    body = text.partition("\n")[2]
    assert body.isascii()
    assert r"\begin{tabular}{lrrlrr}" in body
    assert [name in body for name in (r"\toprule", r"\midrule", r"\bottomrule")] == [True] * 3
    assert r"\caption{Gain over A\_B, 95 \% interval}" in body
    assert r"50 \% of A \& B & 41.6 $\pm$ 2.9 & +3.0 [$-$2.0, 8.0] & higher & 1,281,167 & 1.235e$-$05 \\" in body
    assert r"source\_n & accuracy" in body
    assert not re.search(r"(?<!\\)[%_#]", body)
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {5}


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"x\y {50%} ~^", r"x\textbackslash{}y \{50\%\} \textasciitilde{}\textasciicircum{}"),
        ("  inner", r"\quad inner"),
        ("two\nlines", "two lines"),
        ("[1, 2]", "{}[1, 2]"),  # at the start of a row it would be the length of the row break before it
        ("ρ ≥ 0.3 → |Δ| < 2·10^3", None),
    ],
)
def test_escapes(text, latex):
    assert escape_latex(text) == latex or (latex is None and escape_latex(text).isascii())


def test_files_hold_exact_values_and_the_text(frame, tmp_path):
    csv, tex = write_table(frame, tmp_path / "v1.5 gains", "Gains")
    assert (csv.name, tex.name) == ("v1.5 gains.csv", "v1.5 gains.tex")
    back = pd.read_csv(csv, float_precision="round_trip")
    assert back["p"].tolist()[::2] == [0.0000123456, -0.25]
    assert back["images"].tolist()[:2] == [1_281_167, 900]
    assert "1,281,167" in tex.read_text()
