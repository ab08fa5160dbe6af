"""The embedded corpus, tasks and models: what the README says of them."""

import datetime
import json
import random
from collections import Counter

import pytest
import torch
from sklearn.metrics import adjusted_rand_score, mutual_info_score

import hcsmoe_core as core
from hcsmoe_core import demo
from hcsmoe_core._util import EMBEDDED, folder_of
from hcsmoe_core.demo import corpus, tasks
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.studies import tables as study
from hcsmoe_core.text.calibration import domains_of
from tools import models as shapes
from tools import train
from tools.tasks import load_items, make_items, write_items


@pytest.mark.parametrize("domain", corpus.PROCEDURAL)
def test_splits_never_overlap(domain):
    rng = random.Random(0)
    prompts = {
        split: {corpus.draw(domain, rng, split).prompt for _ in range(1500)} for split in corpus.SPLITS
    }
    assert not prompts["train"] & prompts["calibration"]
    assert not prompts["train"] & prompts["heldout"]
    assert not prompts["calibration"] & prompts["heldout"]
    assert min(map(len, prompts.values())) > 100


def test_library_text_is_split_by_file():
    texts = corpus.stdlib_texts()
    for domain in corpus.STDLIB:
        assert min(len(t) for t in texts[domain].values()) > 50_000
        lines = {
            s: {x.strip() for x in t.splitlines() if len(x.strip()) > 60} for s, t in texts[domain].items()
        }
        assert not lines["train"] & lines["heldout"]
        assert not lines["train"] & lines["calibration"]
        assert not lines["calibration"] & lines["heldout"]


ANSWERS = {
    "arithmetic": lambda p: str(eval(p.removesuffix("="))),
    "sorting": lambda p: " " + " ".join(sorted(p.split()[1:-1], key=int)),
    "series": lambda p: " " + str(2 * int(p.split()[-1]) - int(p.split()[-2])),
    "largest": lambda p: " " + max(p.split()[2:-1], key=int),
    "recall": lambda p: " " + dict(zip(p.split()[1:-2:2], p.split()[2:-2:2], strict=False))[p.split()[-1]],
}


@pytest.mark.parametrize("domain", ANSWERS)
def test_answers_are_right(domain):
    rng = random.Random(1)
    for _ in range(300):
        item = corpus.PROCEDURAL[domain](rng)
        assert item.answer == ANSWERS[domain](item.prompt)


def test_more_answers_are_right():
    assert [corpus.NUMERALS[n] for n in (1, 4, 9, 14, 40, 90, 400, 1994, 3999)] == [
        "I", "IV", "IX", "XIV", "XL", "XC", "CD", "MCMXCIV", "MMMCMXCIX",
    ]  # fmt: skip
    value = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for number in range(1, 4000):
        digits = [value[letter] for letter in corpus.NUMERALS[number]]
        pairs = zip(digits, [*digits[1:], 0], strict=True)
        assert number == sum(-digit if digit < following else digit for digit, following in pairs)
    rng, ahead = random.Random(2), {"after": 1, "before": -1}
    for item in (corpus.dates(rng) for _ in range(2000)):
        if item.prompt.endswith(" is") and " days " in item.prompt:
            days, _, direction, *start, _ = item.prompt.split()
            date, other = (
                datetime.datetime.strptime(f"{text} 2023", "%d %B %Y")
                for text in (" ".join(start), item.answer.strip())
            )
            assert ahead[direction] * (other - date).days % 365 == int(days)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_items_are_those_of_the_generator(name):
    items = load_items(name)
    assert items == make_items(name.removeprefix(tasks.PREFIX))
    assert len(items) >= 250
    assert len({i["prompt"] for i in items}) == len(items)
    assert all(len(set(i["choices"])) == 4 for i in items)
    assert max(Counter(i["answer"] for i in items).values()) < 0.35 * len(items)
    domain = name.removeprefix(tasks.PREFIX)
    learnt = {corpus.draw(domain, random.Random(s), "train").prompt for s in range(2000)}
    assert not learnt & {i["prompt"] for i in items}


def test_items_made_again(tmp_path):
    write_items(tmp_path)
    for name in tasks.NAMES:
        assert (tmp_path / tasks.path_of(name).name).read_bytes() == tasks.path_of(name).read_bytes()


@pytest.fixture(scope="module", params=EMBEDDED)
def embedded(request):
    model, tokenizer = core.load_model(request.param, dtype="float32")
    input_ids = core.calibration_tokens("demo", tokenizer, sequences=96, length=256)
    return (
        request.param,
        model,
        tokenizer,
        core.capture(model, input_ids, domains=domains_of("demo", 96)),
    )


def test_weights_are_small_bfloat16_and_stock(embedded):
    from safetensors.torch import load_file

    name, model, tokenizer, _ = embedded
    folder = folder_of(name)
    assert sum(p.stat().st_size for n in EMBEDDED for p in folder_of(n).rglob("*")) <= 24e6
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert type(model).__module__.startswith("transformers.models.")
    text = "sort 3 1 2 : 1 2 3\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    config = model.config
    if name == "demo-qwen":
        assert (config.num_experts, config.num_experts_per_tok, config.shared_expert_intermediate_size) == (
            32,
            4,
            128,
        )
    else:
        assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)


def test_no_expert_is_dead_and_routing_depends_on_the_domain(embedded):
    _, _, _, stats = embedded
    table = study.usage_table(stats)
    for row, sums in zip(table.to_dict("records"), stats.layers.values(), strict=True):
        count = sums.usage_count.sum(0)
        assert row["unused"] == 0
        assert row["least used"] == pytest.approx(count.min().item() / count.double().mean().item())
        assert row["least used"] > 0.2  # of an equal share
        information = mutual_info_score(None, None, contingency=sums.usage_count.numpy())
        assert row["information, nats"] == pytest.approx(information)
        assert information > 0.05


def test_true_families_are_known_where_the_model_was_grown():
    assert demo.families("demo-mixtral") is None
    assert demo.families("somebody/else") is None
    families = demo.families("demo-qwen")
    assert families[16] == [e // 2 for e in range(32)]
    assert families[8] == [e // 4 for e in range(32)]


@pytest.mark.parametrize("name", EMBEDDED)
def test_shapes_are_those_of_the_committed_weights(name):
    wanted = json.loads((folder_of(name) / "config.json").read_text())
    made = json.loads(shapes.configuration(name).to_json_string(use_diff=False))
    set_by_saving = {"architectures", "dtype", "transformers_version"}
    assert {key: made.get(key) for key in wanted if key not in set_by_saving} == {
        key: value for key, value in wanted.items() if key not in set_by_saving
    }


def test_training_is_recorded():
    for name in EMBEDDED:
        made = json.loads((folder_of(name) / "training.json").read_text())
        assert made["recipe"] == json.loads(json.dumps(made["recipe"] | train.asdict(train.RECIPES[name])))
        assert made["tokens"] >= 20e6


def test_splitting_keeps_what_the_parent_computes():
    """Without noise, twice the experts, each twice, at twice the top-k compute the same."""
    parent = train.build("demo-qwen", 8, 0)
    child = train.build("demo-qwen", 16, 1)
    train.split_experts(parent, child, 0.0, 0)
    child_experts, parent_experts = child.model.layers[0].mlp.experts, parent.model.layers[0].mlp.experts
    for e in range(16):
        assert torch.equal(child_experts.down_proj[e], parent_experts.down_proj[e // 2])
    ids = torch.randint(0, 1024, (2, 12))
    for layer in child.model.layers:
        layer.mlp.gate.top_k = 8
    with torch.no_grad():
        torch.testing.assert_close(child(ids).logits, parent(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_training_resumed_gives_the_same_weights(tmp_path, monkeypatch):
    recipe = train.Recipe(stages=((1, 2), (8, 2), (16, 2)), sequences=2, length=32, warmup=2)
    whole = train.train("demo-qwen", tmp_path / "whole", recipe, every=100)
    saved = train.save_checkpoint

    def stopped(folder, model, optimizer, progress):
        saved(folder, model, optimizer, progress)
        if progress["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train("demo-qwen", tmp_path / "stopped", recipe, every=1)
    monkeypatch.setattr(train, "save_checkpoint", saved)
    again = train.train("demo-qwen", tmp_path / "stopped", recipe, every=100)
    assert again["final_training_loss"] == whole["final_training_loss"]
    for file in ("model.safetensors", "families.json", "tokenizer.json"):
        assert (tmp_path / "whole/model" / file).read_bytes() == (
            tmp_path / "stopped/model" / file
        ).read_bytes()
    with pytest.raises(ValueError, match="written by another recipe"):
        train.train("demo-qwen", tmp_path / "stopped", train.Recipe(stages=((1, 2),)))


def test_the_planted_families_are_found(embedded):
    """By weights and router logits nearly exactly; by mean outputs in part, but far from by chance."""
    name, model, _, stats = embedded
    if name != "demo-qwen":
        assert study.family_agreement(stats, model, linkages=["average"], similarities=["weight"]) is None
        return
    table = study.family_agreement(
        stats, model, linkages=["average"], similarities=["expert-output", "router-logits", "weight"]
    )
    for row in table.to_dict("records"):
        by_layer = [row[f"layer {i}"] for i in range(4)]
        if row["similarity"] != "expert-output":
            assert min(by_layer) > 0.8
        elif row["groups"] == 16:
            assert min(by_layer) > 0.2
    family, labels = demo.families("demo-qwen")[16], core.cut(merge_tree(stats, 1), 16)
    row = table[(table["similarity"] == "expert-output") & (table["groups"] == 16)].iloc[0]
    assert row["layer 1"] == round(adjusted_rand_score(family, labels), 2)
