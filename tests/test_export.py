"""What lies beside the weights, routers with fewer rows, how far a written model is from the original."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, logits, tiny_model, tokens

from hcsmoe_core import (
    apply_plan,
    capture,
    find_moe_layers,
    load_merged,
    load_model,
    make_plan,
    restore,
    save_merged,
)
from hcsmoe_core._util import InputError
from hcsmoe_core.checkpoint.export import fidelity_text
from hcsmoe_core.methods.routing import PENALTY, folded_rows
from hcsmoe_core.plan import LayerPlan, Plan, load_plan, with_router
from hcsmoe_core.score.fidelity import fidelity, unseen
from hcsmoe_core.ui import family_table
from tools import family_table as families

NEEDS = ("usage", "outputs", "norms", "grams", "sample")


@pytest.fixture
def model():
    return tiny_model("mixtral")


@pytest.fixture
def stats(model, input_ids):
    return capture(model, input_ids, needs=NEEDS)


# --- rows kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_a_kept_row_is_that_of_the_expert_used_most(name, input_ids):
    model = tiny_model(name)
    stats = capture(model, input_ids, needs=NEEDS)
    plan = make_plan(stats, model, experts=4, router="row-kept")
    before = {layer.name: layer.router.weight.clone() for layer in find_moe_layers(model)}
    apply_plan(model, plan)
    for layer, layer_plan in zip(find_moe_layers(model), plan.layers, strict=True):
        usage = stats.layers[layer.name].usage_count.sum(0)
        for group, members in enumerate(layer_plan.groups()):
            used_most = max(members, key=lambda e, usage=usage: int(usage[e]))
            assert torch.equal(layer.router.weight[group], before[layer.name][used_most])


def test_kept_rows_over_experts_that_stand_for_their_group_are_a_pruned_model(model, stats, input_ids):
    """Where a merged expert is one of its members, keeping that one's row is dropping the others."""
    merged = make_plan(stats, model, experts=4, router="row-kept")
    pruned = []
    for layer in merged.layers:
        kept = sorted(layer.dominant)
        labels = [kept.index(e) if e in kept else -1 for e in range(len(layer.labels))]
        pruned.append(
            LayerPlan(layer.name, labels, [float(e in kept) for e in range(len(labels))], router="dropped")
        )
    alone = []
    for layer in merged.layers:
        weights = [float(e in layer.dominant) for e in range(len(layer.labels))]
        alone.append(LayerPlan(layer.name, layer.labels, weights, router="row-kept"))
    apply_plan(model, Plan(alone))
    found = logits(model, input_ids)
    restore(model)
    torch.testing.assert_close(found, logits(apply_plan(model, Plan(pruned)), input_ids))


def test_groups_that_a_router_chooses_first_become_one(input_ids, tmp_path):
    model = tiny_model("deepseek_v3")
    assert model.config.n_group > 1
    stats = capture(model, input_ids, needs=NEEDS)
    before = logits(model, input_ids)
    plan = make_plan(stats, model, experts=3, router="folded")
    apply_plan(model, plan, stats)
    live = logits(model, input_ids)
    restore(model)
    assert torch.equal(logits(model, input_ids), before)
    assert save_merged(model, plan, tmp_path / "m", stats=stats)["router"] == "plain"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (1, 1, 3)
    torch.testing.assert_close(logits(load_model(tmp_path / "m")[0], input_ids), live)


# --- rows folded --------------------------------------------------------------------------------------------


def naive_loss(rows, start, sample, labels, scoring, normalised):
    """Mean cross-entropy between where a token went and where the new rows send it, one by one in float64."""
    total = 0.0
    for logit, index, weight in zip(
        sample.logits.double(), sample.index, sample.weight.double(), strict=True
    ):
        target = torch.zeros(len(rows), dtype=torch.float64)
        if scoring == "softmax" and not normalised:
            for expert, share in enumerate(logit.softmax(0)):
                target[labels[expert]] += share
        else:
            for expert, share in zip(
                index.tolist(), weight if scoring == "softmax" else logit.sigmoid()[index], strict=True
            ):
                target[labels[expert]] += share
            target = target / (target.sum() if scoring == "softmax" else target.max().clamp(min=1))
        new = rows @ logit
        if scoring == "softmax":
            total = total - (target * new.log_softmax(0)).sum()
        else:
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(new, target, reduction="sum")
    return total / len(sample.logits) + PENALTY * ((rows - start) ** 2).sum()


@pytest.mark.parametrize(
    ("name", "scoring", "normalised"),
    [
        ("mixtral", "softmax", True),
        ("olmoe", "softmax", False),
        ("qwen3_moe", "softmax", False),
        ("laguna", "sigmoid", True),
    ],
)
def test_folded_rows_are_the_best_there_are(name, scoring, normalised):
    """The loss is convex: where a naive one, differentiated by PyTorch, has no slope, it is smallest."""
    model = families.tiny_model(name)
    stats = capture(model, families.tiny_tokens(8), needs=NEEDS, sample=60, progress=False)
    for layer_plan in make_plan(stats, model, experts=4, router="folded").layers:
        sample, start = stats.layers[layer_plan.name].sample, torch.from_numpy(layer_plan.router_rows())
        rows = torch.from_numpy(folded_rows(layer_plan, sample)).requires_grad_()
        loss = naive_loss(rows, start, sample, layer_plan.labels, scoring, normalised)
        loss.backward()
        first = start.clone().requires_grad_()
        begun = naive_loss(first, start, sample, layer_plan.labels, scoring, normalised)
        begun.backward()
        assert loss < begun
        assert rows.grad.norm() < 2e-3 * first.grad.norm()


def test_folding_finds_planted_rows():
    """Every expert has a twin: routing to pairs is a softmax of one logit per pair, which rows can give."""
    model = families.tiny_model("olmoe")  # its weights are not normalised
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.router.weight[5:] = layer.router.weight[:5]
    stats = capture(model, families.tiny_tokens(16), needs=NEEDS, sample=256, progress=False)
    for layer in find_moe_layers(model):
        sample = stats.layers[layer.name].sample
        plan = LayerPlan(layer.name, [0, 1, 2, 3, 4] * 2, [0.5] * 10, router="folded")
        rows = torch.from_numpy(folded_rows(plan, sample))
        wanted = sample.logits.double().softmax(1).unflatten(1, (2, 5)).sum(1)
        torch.testing.assert_close((sample.logits.double() @ rows.T).softmax(1), wanted, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_folding_is_nearer_to_the_exact_merge_than_keeping_rows(tmp_path):
    model, tokenizer = load_model("demo-qwen")
    from hcsmoe_core import calibration_tokens

    rows = calibration_tokens("demo", tokenizer, sequences=44, length=128, seed=0)
    stats = capture(model, rows[:40], needs=NEEDS, progress=False)
    found = {}
    for router in ("row-kept", "averaged", "folded"):
        plan = make_plan(stats, model, experts=16, router=router)
        found[router] = fidelity(
            model, plan, unseen(rows, stats.sequences, length=128), stats=stats, progress=False
        )
    own = [
        found[r]["models"][n]["kl_from_mapped"]
        for r, n in zip(found, ("row-kept", "router averaged", "folded"), strict=True)
    ]
    assert own[2] < 0.5 * min(own[:2])
    assert len({f["models"]["mapped"]["kl"] for f in found.values()}) == 1
    assert found["folded"]["tokens"] == 4 * 128


def test_folding_needs_the_sample(model, input_ids, tmp_path):
    stats = capture(model, input_ids)
    plan = with_router(make_plan(stats, model, experts=4), "folded")
    with pytest.raises(ValueError, match="routers folded"):
        apply_plan(model, plan)
    with pytest.raises(ValueError, match="sample"):
        save_merged(model, plan, tmp_path / "m", stats=stats)
    assert not any(tmp_path.iterdir())


def test_routers_that_a_plan_cannot_have(model, stats):
    with pytest.raises(ValueError, match="drops experts"):
        with_router(make_plan(stats, model, experts=4, method="reap"), "folded")
    with pytest.raises(ValueError, match='"router" argument must be one of'):
        with_router(make_plan(stats, model, experts=4), "guessed")


def test_rows_of_experts_that_stay_apart_are_left_alone(model, stats, tmp_path):
    """A checkpoint for stock engines is asked for, and trimmed experts give one with the router as it was."""
    plan = make_plan(stats, model, experts=4, method="trimming")
    assert with_router(plan, "folded").layers == plan.layers
    for router in ("", "folded", "row-kept"):
        assert (
            save_merged(model, plan, tmp_path / f"m{router}", stats=stats, router=router)["router"] == "plain"
        )
    written = [
        (tmp_path / f"m{router}/model.safetensors").read_bytes() for router in ("", "folded", "row-kept")
    ]
    assert written[0] == written[1] == written[2]


def test_layers_with_different_numbers_have_no_plain_checkpoint(model, stats, tmp_path):
    plan = make_plan(stats, model, experts=[2, 4, 5])
    with pytest.raises(ValueError, match=r"layers differ in their number of experts \(2, 4, 5\)"):
        save_merged(model, plan, tmp_path / "m", stats=stats, router="folded")


# --- fidelity -----------------------------------------------------------------------------------------------


def test_a_plan_that_changes_nothing_is_faithful(model, stats, input_ids):
    plan = make_plan(stats, model, experts=8)
    found = fidelity(model, plan, tokens(3, seed=8), progress=False)
    made = found["models"]["mapped"]
    assert made["perplexity"] == found["original"]["perplexity"]
    assert (made["kl"], made["agreement"], found["warning"]) == (0, 1, "")
    assert set(made["block_error"] + made["hidden_error"]) == {0}
    assert found["layers"] == [layer.name for layer in plan.layers]


def naive_fidelity(model, plan, stats, ids):
    """The same one model at a time, every tensor kept, in float64."""

    def run(inputs=None):
        blocks, hidden, taken, handles = [], [], [], []
        for i, layer in enumerate(model.model.layers):
            block = layer.mlp
            handles.append(block.register_forward_pre_hook(lambda _, args: taken.append(args[0])))
            handles.append(layer.register_forward_hook(lambda *args: hidden.append(args[-1].double())))
            handles.append(block.register_forward_hook(lambda *args: blocks.append(args[-1].double())))
            if inputs is not None:  # the block of each layer gets what it got in the original
                handles.append(block.register_forward_pre_hook(lambda _, args, i=i: (inputs[i],)))
        with torch.no_grad():
            logs = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        return blocks, hidden, logs, taken

    blocks, hidden, logs, inputs = run()
    apply_plan(model, plan, stats)
    hidden_2, logs_2 = run()[1:3]
    blocks_2 = run(inputs)[0]
    restore(model)
    error = [float((b - a).norm() / a.norm()) for a, b in zip(blocks, blocks_2, strict=True)]
    drift = [float((b - a).norm() / a.norm()) for a, b in zip(hidden, hidden_2, strict=True)]
    loss = [-float(x[:, :-1].gather(2, ids[:, 1:, None]).mean()) for x in (logs, logs_2)]
    kl = float((logs.exp() * (logs - logs_2)).sum(-1).mean())
    return error, drift, loss, kl, float((logs.argmax(-1) == logs_2.argmax(-1)).double().mean())


@pytest.mark.parametrize(
    ("method", "router"), [("hc-smoe", ""), ("hc-smoe", "folded"), ("reap", ""), ("trimming", "")]
)
def test_fidelity_is_that_of_a_naive_comparison(model, stats, method, router):
    plan, ids = (
        make_plan(stats, model, experts=3, method=method, **({"router": router} if router else {})),
        tokens(4, 33, seed=7),
    )
    found = fidelity(model, plan, ids, stats=stats, progress=False)
    assert not any(layer.merged for layer in find_moe_layers(model))
    error, drift, loss, kl, agreement = naive_fidelity(model, plan, stats, ids)
    made = next(iter(found["models"].values()))
    assert made["block_error"] == pytest.approx(error, rel=1e-5)
    assert made["hidden_error"] == pytest.approx(drift, rel=1e-5)
    assert [found["original"]["loss"], made["loss"]] == pytest.approx(loss, rel=1e-6)
    assert made["kl"] == pytest.approx(kl, rel=1e-4)
    assert made["agreement"] == pytest.approx(agreement)
    if router:
        exact = naive_fidelity(model, with_router(plan, "mapped"), stats, ids)
        assert found["models"]["mapped"]["kl"] == pytest.approx(exact[3], rel=1e-4)


def test_fidelity_of_a_model_that_is_merged_already(model, stats, input_ids):
    plan = make_plan(stats, model, experts=3, router="folded")
    wanted = fidelity(model, plan, tokens(2, seed=7), stats=stats, progress=False)
    apply_plan(model, plan, stats)
    live = logits(model, input_ids)
    assert fidelity(model, plan, tokens(2, seed=7), progress=False) == wanted
    assert torch.equal(logits(model, input_ids), live)


def test_the_layer_that_ruins_a_model_is_named(model, input_ids, tmp_path, capsys):
    """All experts of the second layer, which are large and cancel, are joined; other layers stay."""
    with torch.no_grad():
        for tensor in find_moe_layers(model)[1].tensors().values():
            tensor.mul_(30)
    stats = capture(model, input_ids)
    plans = [make_plan(stats, model, experts=r).layers[i] for i, r in enumerate((8, 1, 8))]
    found = fidelity(model, Plan(plans), tokens(4, 30, seed=2), progress=False)
    made = found["models"]["mapped"]
    assert made["block_error"][0] == 0 < made["block_error"][1]
    original = found["original"]["perplexity"]
    assert bool(found["warning"]) == (made["perplexity"] > 2 * original)
    found["models"]["mapped"]["perplexity"] = 3 * original
    from hcsmoe_core.score.fidelity import _warning

    assert "rises most in model.layers.1.mlp.experts" in _warning(found)


def test_only_tokens_that_were_not_captured_are_held_out(model, input_ids):
    seen = capture(model, input_ids).sequences
    both = torch.cat([input_ids[:2], tokens(3, input_ids.shape[1], seed=77)])
    assert torch.equal(unseen(both, seen, length=5), both[2:, :5])
    assert unseen(input_ids, seen, length=5) is None
    assert torch.equal(unseen(both, [], length=99), both)


# --- the folder ---------------------------------------------------------------------------------------------


def test_the_card_tells_what_was_done(model, stats, tmp_path):
    model.name_or_path = "someone/mixture"
    plan = make_plan(stats, model, experts=5, linkage="complete")
    measured = fidelity(model, with_router(plan, "folded"), tokens(2, seed=9), stats=stats, progress=False)
    options = dict(stats=stats, router="folded", fidelity=measured, card={"calibration": "of mine"})
    written = save_merged(model, plan, tmp_path / "m", **options)
    _, head, text = (tmp_path / "m" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "someone/mixture"
    assert "| experts per layer | 5 of 8, in 3 MoE layers |" in text
    assert '    linkage: "complete"' in text
    assert "| calibration | of mine |" in text
    assert "divide evenly over 1, 5 devices" in text
    assert written["fidelity"] == measured
    made = measured["models"]["folded"]
    assert f"| folded | {made['perplexity']:.4g} | {made['kl']:.4g} |" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert str(tmp_path) not in text
    assert load_plan(tmp_path / "m" / "plan.json").layers[0].router == "folded"


def test_a_model_that_predicts_no_tokens_has_no_perplexity(model, stats):
    measured = fidelity(model, make_plan(stats, model, experts=4), tokens(1, seed=9), progress=False)
    for scores in (measured["original"], measured["models"]["mapped"]):
        scores["perplexity"] = None
    text = fidelity_text(measured)
    assert "| original | – | 0 |" in text
    assert "| mapped | – | " in text


def test_the_card_of_a_model_from_a_folder_shows_no_path(input_ids, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "original")
    model, _ = load_model(tmp_path / "original")
    save_merged(model, make_plan(capture(model, input_ids), model, experts=4), tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "Not measured" in card


def test_fewer_experts_than_a_token_goes_to_are_told(model, stats, tmp_path):
    written = save_merged(
        model, make_plan(stats, model, experts=1, router="row-kept"), tmp_path / "m", stats=stats
    )
    assert any("rather than to 2" in line for line in written["limits"])
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_experts_per_tok"] == 1


@pytest.mark.parametrize("family", ["gemma4", "qwen3_moe", "dbrx"])
def test_a_plain_configuration_says_how_many_experts_are_left_to_choose(family, tmp_path):
    """Also where the block keeps the original's configuration beside the router's own."""
    model, ids, count = families.tiny_model(family), families.tiny_tokens(8), families.CHOSEN - 1
    stats = capture(model, ids, progress=False)
    plan = make_plan(stats, model, experts=count, router="row-kept")
    save_merged(model, plan, tmp_path / "m", router="plain")
    live = logits(apply_plan(model, plan), ids)
    torch.testing.assert_close(logits(load_model(tmp_path / "m")[0], ids), live)


def test_checksums_are_those_of_the_files(model, stats, tmp_path):
    save_merged(model, make_plan(stats, model, experts=4), tmp_path / "m")
    listed = dict(line.split("  ")[::-1] for line in (tmp_path / "m" / "SHA256SUMS").read_text().splitlines())
    held = {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in (tmp_path / "m").iterdir()
        if f.name not in ("README.md", "SHA256SUMS")
    }
    assert listed == held
    wanted = {"model.safetensors", "config.json", "generation_config.json", "plan.json", "modeling_hcsmoe.py"}
    assert wanted <= set(listed)


def test_the_original_configuration_is_carried_over(input_ids, tmp_path):
    """As of a checkpoint of another version: other names for the same, and keys unknown to transformers."""
    folder = tmp_path / "original"
    tiny_model("qwen3_moe").save_pretrained(folder)
    before = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in before.items() if key not in ("num_local_experts", "dtype")}
    config |= {
        "num_experts": 8,
        "torch_dtype": "float32",
        "their_own": {"a": 1},
        "num_nextn_predict_layers": 2,
    }
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_theirs.Theirs"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("theirs")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "secret.txt").write_text("not asked for")
    model, _ = load_model(folder)
    stats = capture(model, input_ids)
    save_merged(model, make_plan(stats, model, experts=4, router="row-kept"), tmp_path / "m", stats=stats)
    made = json.loads((tmp_path / "m" / "config.json").read_text())
    assert made["num_experts"] == 4
    assert "num_local_experts" not in made
    assert made["their_own"] == {"a": 1}
    assert made["num_nextn_predict_layers"] == 0
    assert "auto_map" not in made
    changed = {key for key in made if made[key] != config.get(key)}
    assert changed <= {"num_experts", "num_nextn_predict_layers", "dtype"}
    assert (tmp_path / "m" / "LICENSE").read_text() == "theirs"
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "m" / "secret.txt").exists()
    assert [layer.num_stored for layer in find_moe_layers(load_model(tmp_path / "m")[0])] == [4] * len(
        find_moe_layers(model)
    )


# --- without us ---------------------------------------------------------------------------------------------

STOCK = """
import json, sys
sys.modules["hcsmoe_core"] = None  # cannot be imported
import torch, transformers
for folder, name, ours in json.loads(sys.argv[1]):
    options = {"trust_remote_code": True} if ours else {}
    model = getattr(transformers, name).from_pretrained(folder, **options).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    ids = torch.load(folder + "/ids.pt")
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    torch.save(logits, folder + "/logits.pt")
"""
KINDS = ("mapped", "row-kept", "folded", "pruned", "trimmed")
SUPPORTED = [row["family"] for row in family_table.committed()[1] if not row["mapped"] and not row["whole"]]


def plan_of(kind, stats, model):
    method = {"pruned": "reap", "trimmed": "trimming"}.get(kind, "hc-smoe")
    experts = {"row-kept": families.CHOSEN - 1, "trimmed": families.EXPERTS // 2}.get(kind, families.KEPT)
    plan = make_plan(stats, model, experts=experts, method=method)
    return with_router(plan, kind) if kind in ("row-kept", "folded") else plan


def write_all(family, folder, ids):
    """Write every kind of checkpoint that a family has; outputs of the live models, and why others lack."""
    model, made, refused = families.tiny_model(family), {}, {}
    stats = capture(model, ids, needs=NEEDS, sample=64, progress=False)
    for kind in KINDS:
        try:
            plan = plan_of(kind, stats, model)
            router = "mapped" if kind == "mapped" else "plain"
            save_merged(model, plan, folder / kind, stats=stats, router=router)
            measured = fidelity(model, plan, families.tiny_tokens(1, 8, seed=3), stats=stats, progress=False)
            assert f"| {next(iter(measured['models']))} | " in fidelity_text(measured)
            apply_plan(model, plan, stats)
        except ValueError as error:
            refused[kind] = str(error)
            continue
        made[kind] = families.outputs(model, ids)
        restore(model)
        torch.save(ids, folder / kind / "ids.pt")
    return made, refused


# Why some families have no plain checkpoint of some kind: their configuration or router cannot say it.
REFUSED = {
    "deepseek_v4": (
        "row-kept, pruned",
        "tid2eid",
    ),  # a table of each token's experts, as many as in the original
    "ernie4_5_vl_moe": ("row-kept, folded, pruned", "counts other tensors along"),
    "jetmoe": ("row-kept, folded, pruned", "counts other tensors along"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_kind_of_every_family_opens_without_us(tmp_path, part):
    ids, live, opened = families.tiny_tokens(8), {}, []
    for family in SUPPORTED[part::4]:
        made, refused = write_all(family, tmp_path / family, ids)
        assert "mapped" in made
        kinds, reason = REFUSED.get(family, ("", ""))
        assert {k for k in refused if k != "trimmed"} == set(filter(None, kinds.split(", "))), (
            family,
            refused,
        )
        assert all(reason in refused[k] for k in refused if k != "trimmed")
        auto = families.model_of(family)[2].__name__
        for kind, outputs in made.items():
            live[family, kind] = outputs
            opened.append([str(tmp_path / family / kind), auto, kind == "mapped"])
    subprocess.run([sys.executable, "-c", STOCK, json.dumps(opened)], check=True, cwd=tmp_path)
    for (family, kind), outputs in live.items():
        assert torch.equal(torch.load(tmp_path / family / kind / "logits.pt"), outputs), (family, kind)


def test_a_mapped_model_that_stock_transformers_saved_again(model, stats, input_ids, tmp_path):
    from transformers import AutoModelForCausalLM

    plan = make_plan(stats, model, experts=[2, 8, 5])
    save_merged(model, plan, tmp_path / "m")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    opened.set_experts_implementation("eager")
    opened.save_pretrained(tmp_path / "again")
    live = logits(apply_plan(model, plan), input_ids)
    assert torch.equal(logits(opened.eval(), input_ids), live)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval(),
        load_merged(tmp_path / "again"),
    ):
        torch.testing.assert_close(logits(loaded, input_ids), live)
    prompt = input_ids[:2, :6]
    options = dict(
        attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.equal(opened.generate(prompt, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("router", ["mapped", "folded"])
def test_low_rank_experts_are_written_dense(model, stats, input_ids, tmp_path, router):
    from transformers import AutoModelForCausalLM

    plan = make_plan(stats, model, experts=4, method="mc-smoe", budget="uniform")
    save_merged(model, plan, tmp_path / "m", stats=stats, router=router)
    assert not any(layer.merged for layer in find_moe_layers(model))
    plan = load_plan(tmp_path / "m" / "plan.json")
    assert plan.compress
    live = logits(apply_plan(model, plan, stats), input_ids)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=router == "mapped").eval()
    for loaded in (load_model(tmp_path / "m")[0], opened):
        torch.testing.assert_close(logits(loaded, input_ids), live)


def test_folders_with_factors_are_refused(model, stats, tmp_path):
    """As earlier versions wrote them: experts in a file of their own, other weights under unusual names."""
    folder = tmp_path / "m"
    save_merged(model, make_plan(stats, model, experts=4), folder)
    config = json.loads((folder / "config.json").read_text())
    config["expert_merge"]["factored"] = True
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "model.factored.safetensors")
    (folder / "SHA256SUMS").unlink()
    for load in (load_merged, load_model):
        with pytest.raises(InputError, match=r"keeps its experts as factors.*hcsmoe merge MODEL --plan"):
            load(folder)


def test_records_that_do_not_fit_are_refused_by_the_file_in_the_folder(model, stats, tmp_path):
    from transformers import AutoModelForCausalLM

    save_merged(model, make_plan(stats, model, experts=4), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    whole = json.loads(config.read_text())
    name = "model.layers.0.mlp.experts"

    def opened(change):
        settings = json.loads(json.dumps(whole))
        change(settings["expert_merge"])
        config.write_text(json.dumps(settings))
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)

    with pytest.raises(ValueError, match="another version of hcsmoe"):
        opened(lambda merge: merge.update(version=1))
    with pytest.raises(ValueError, match=f"does not fit {name}"):
        opened(lambda merge: merge["layers"][name].pop("labels"))
    with pytest.raises(ValueError, match="does not fit model.layers.9"):
        opened(lambda merge: merge["layers"].update({"model.layers.9": merge["layers"][name]}))
    opened(lambda merge: None)


@pytest.mark.slow
def test_the_command_writes_every_kind(tmp_path):
    def run(*words):
        out = subprocess.run(
            [
                sys.executable,
                "-m",
                "hcsmoe_core.ui.cli",
                "merge",
                "demo-mixtral",
                "--sequences",
                "20",
                "--length",
                "64",
                *words,
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        return out.returncode, out.stdout, out.stderr

    code, said, warned = run(
        "--experts",
        "4",
        "--method",
        "hc-smoe",
        "--router",
        "folded",
        "--out",
        tmp_path / "folded",
        "--fidelity",
        "2",
    )
    assert code == 0
    assert "plain; load it with any loader of the original family" in said
    assert re.search(r"^folded +[\d.]+", said, re.MULTILINE)
    assert "on 128 held-out tokens" in said
    assert "WARNING: Off a cliff" in warned  # half of unrelated experts, averaged
    assert "Off a cliff" not in said
    assert "calibrated on 1,280 tokens; domains: " in said
    code, said, _ = run(
        "--plan", tmp_path / "folded" / "plan.json", "--out", tmp_path / "again", "--router", "mapped"
    )
    assert code == 0
    assert re.search(r"^mapped +[\d.]+", said, re.MULTILINE)
    code, said, _ = run(
        "--experts", "4", "--method", "recommended", "--out", tmp_path / "best", "--fidelity", "0"
    )
    assert code == 0
    assert "8 experts of 128 neurons per layer" in said  # unrelated: trimmed
    assert json.loads((tmp_path / "best/plan.json").read_text())["settings"]["method"] == "least-residual"
    code, _, said = run("--experts", "4", "--router", "guessed", "--out", tmp_path / "no")
    assert code == 2
    assert "--router must be one of" in said
    shutil.rmtree(tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "folded"]
