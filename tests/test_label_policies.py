"""Uncertain, blank and healthy cells; tokens and substrings: analytic cases."""

import numpy as np
import pandas as pd
import pytest

from datamodules.alignment import align_labels, shared_names
from datamodules.chest_xray import labels
from datamodules.errors import DataError
from datamodules.metadata import mapped_column, sex_column, years_column

NAN = np.nan


def test_cells_of_a_report():
    frame = pd.DataFrame({"a": ["1.0", "-1.0", "", "0"], "b": ["", "1", " -1 ", "0.0"]})
    np.testing.assert_array_equal(labels.read_cells(frame, "f.csv"), [[1, NAN], [-1, 1], [NAN, -1], [0, 0]])


@pytest.mark.parametrize("value", ["2", "yes", "0.5", "nan"])
def test_a_cell_out_of_range_names_file_line_and_column(value):
    frame = pd.DataFrame({"a": ["1", "0"], "b": ["", value]})
    with pytest.raises(DataError, match=f"label '{value}' in column 'b'") as error:
        labels.read_cells(frame, "f.csv")
    assert "f.csv, line 3" in str(error.value)


VALUES = np.array([[1, NAN, NAN], [-1, 0, 1], [NAN, NAN, 1]], dtype=np.float32)


def test_fill_turns_only_blanks_of_healthy_images_into_zero():
    filled = labels.fill_healthy(VALUES, np.array([False, True, True]), "fill", exempt=[1])
    np.testing.assert_array_equal(filled, [[1, NAN, NAN], [-1, 0, 1], [0, NAN, 1]])


def test_the_papers_rule_erases_explicit_positives():
    filled = labels.fill_healthy(VALUES, np.array([False, True, True]), "cherti2022", exempt=[1])
    np.testing.assert_array_equal(filled, [[1, NAN, NAN], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(("policy", "target"), [("ignore", NAN), ("zeros", 0), ("ones", 1), ("soft", 0.7)])
def test_uncertain_cells_follow_the_policy_in_training_and_are_unknown_elsewhere(policy, target):
    values = np.array([[-1, 1], [-1, NAN]], dtype=np.float32)
    resolved = labels.resolve_uncertain(values, policy, np.array([True, False]))
    np.testing.assert_allclose(resolved, np.array([[target, 1], [NAN, NAN]], dtype=np.float32))
    assert resolved.dtype == np.float32


def test_tokens_become_labels_and_uninformative_rows_are_unknown():
    rows = [["a"], ["a", "both"], ["normal"], ["unchanged"], [], ["unchanged", "a"]]
    columns = {"a": [0], "both": [0, 1], "normal": [], "unchanged": []}
    found = labels.token_matrix(rows, columns, 2, frozenset({"unchanged"}))
    np.testing.assert_array_equal(found, [[1, 0], [1, 1], [0, 0], [NAN, NAN], [NAN, NAN], [1, 0]])
    with pytest.raises(KeyError):
        labels.token_matrix([["else"]], columns, 2, frozenset())


def test_substrings_hit_inside_other_words_as_in_the_paper():
    found = labels.substring_matrix(["['subcutaneous emphysema']", "['normal']"], {"Emphysema": ["emphysema"]})
    assert found.tolist() == [[1], [0]]


def test_labels_are_arranged_by_canonical_name():
    values = np.array([[1, 0, 1]], dtype=np.float32)
    aligned = align_labels(values, ["Pleural Effusion", "Edema", "Mass"], ["Edema", "Hernia", "Effusion"])
    np.testing.assert_array_equal(aligned, [[0, NAN, 1]])
    assert shared_names(["Pleural Effusion", "Mass"], ["Effusion", "Hernia"]) == ["Effusion"]
    with pytest.raises(DataError, match="share no name"):
        align_labels(values, ["x", "y", "z"], ["Edema"])


def test_classes_are_renumbered_and_unknown_ones_become_unlabelled():
    assert align_labels(np.array([0, 1, 2, -1]), ["cat", "dog", "emu"], ["dog", "cat"]).tolist() == [1, 0, -1, -1]


def test_metadata_columns_as_releases_write_them():
    assert sex_column(["F", "Male", "female", "O", "", "Unknown", None]).tolist() == ["F", "M", "F", "", "", "", ""]
    years = years_column(["058Y", "6M", "14D", "2W", "30", "47.0", "", "x"])
    np.testing.assert_allclose(years, [58, 0.5, 14 / 365.25, 14 / 365.25, 30, 47, NAN, NAN], rtol=1e-6)
    assert mapped_column(["AP_horizontal", " PA ", "nan", None], {"AP_horizontal": "AP Supine"}).tolist() == [
        "AP Supine",
        "PA",
        "",
        "",
    ]
