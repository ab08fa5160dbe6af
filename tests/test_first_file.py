"""The package computes what docs/hc_smoe.py, the paper in seventy lines, computes."""

import importlib.util

import pytest
import torch
from conftest import ROOT, logits

from hcsmoe_core import apply_plan, calibration_tokens, capture, load_model, make_plan

spec = importlib.util.spec_from_file_location("hc_smoe", ROOT / "docs" / "hc_smoe.py")
first = importlib.util.module_from_spec(spec)
spec.loader.exec_module(first)


@pytest.mark.parametrize(("name", "experts"), [("demo-mixtral", 5), ("demo-qwen", 16)])
def test_the_paper_in_seventy_lines_gives_the_same_labels_and_logits(name, experts):
    model, tokenizer = load_model(name, dtype="float32", experts_implementation="eager")
    plain, _ = load_model(name, dtype="float32", experts_implementation="eager")
    input_ids = calibration_tokens("demo", tokenizer, sequences=10, length=64)
    plan = make_plan(capture(model, input_ids, progress=False), model, experts=experts)
    apply_plan(model, plan)
    labels = first.hc_smoe(plain, input_ids, experts)
    assert labels.tolist() == [layer.labels for layer in plan.layers]
    assert len(set(map(tuple, labels.tolist()))) > 1  # layers differ, so that equal labels mean something
    merged, wanted = logits(plain, input_ids[:2]), logits(model, input_ids[:2])
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)


def test_it_is_about_seventy_lines():
    lines = (ROOT / "docs" / "hc_smoe.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 80
