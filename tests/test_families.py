"""Every MoE family of the installed transformers, on tiny random models."""

import copy
import json

import pytest
import torch
import transformers

from hcsmoe_core import capture, make_plan, replace, save_merged
from hcsmoe_core.ui import family_table
from tools import family_table as families
from tools.family_table import EXPERTS, KEPT, outputs, tiny_model, tiny_tokens

VERSION, ROWS = family_table.committed()
SUPPORTED = [row["family"] for row in ROWS if not row["mapped"] and not row["whole"]]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
LABELS = [0, 1, 2, 1, 3, 4, 0, 5, 6, 7]  # 3 joins 1, and 6 joins 0
FIRST = [0, 1, 2, 4, 5, 7, 8, 9]
same_version = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"the table is of transformers {VERSION}"
)


def switchable(model):
    """Whether transformers can run its experts in several ways."""
    return all(hasattr(layer.experts, "is_concatenated") for layer in families.find_moe_layers(model))


def built(family, dtype=torch.float32, implementation="eager"):
    """A tiny model, or a skip where its experts have one implementation alone."""
    model = tiny_model(family, dtype)
    if not switchable(model) and implementation != "eager":
        pytest.skip("its experts have one implementation alone")
    if switchable(model):
        model.set_experts_implementation(implementation)
        assert {
            layer.experts.config._experts_implementation for layer in families.find_moe_layers(model)
        } == {implementation}
    return model


def written(model):
    """What a model writes after some tokens, step by step with a cache; None where it does not write."""
    if not model.can_generate():
        return None
    ids = tiny_tokens(2, 7, seed=3)
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids), use_cache=True)
    model.generation_config.eos_token_id = None
    return model.generate(ids, **options)


def put(model, labels, rows):
    for layer in families.find_moe_layers(model):
        replace.replace_experts(
            layer, {n: t.detach()[rows].clone() for n, t in layer.tensors().items()}, labels
        )


@same_version
def test_the_table_has_every_family():
    assert [(row["family"], row["whole"]) for row in ROWS] == families.installed_models()
    assert [row["family"] for row in ROWS if not row["whole"]] == families.installed_families()
    assert {"mixtral", "gpt_oss", "dbrx", "doge", "qwen3_vl_moe"} <= {row["family"] for row in ROWS}


@same_version
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"] or row["family"])
def test_the_table_says_what_is_found(row):
    assert families.probe(row["family"], whole=row["whole"]) == row


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED)
def test_sixteen_bits_work_alike(family):
    row = next(row for row in ROWS if row["family"] == family and not row["whole"])
    found = families.probe(family, torch.bfloat16)
    assert (found["mapped"], found["plain"]) == (row["mapped"], row["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", SUPPORTED)
def test_identity_changes_no_bit(family, implementation):
    model, ids = built(family, implementation=implementation), tiny_tokens()
    before, text = outputs(model, ids), written(model)
    put(model, list(range(EXPERTS)), list(range(EXPERTS)))
    assert torch.equal(outputs(model, ids), before)
    assert text is None or torch.equal(written(model), text)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", SUPPORTED)
def test_twins_share_one_expert(family, implementation):
    # Merged experts get their tokens in one product instead of two, which rounds otherwise: see it in float64
    # where there is a kernel for it. Some families go through float32 inside whatever they are given, and
    # Inkling 2 takes nothing wider.
    wide = implementation != "grouped_mm" and family != "inkling2"
    model = built(family, torch.float64 if wide else torch.float32, implementation)
    ids = tiny_tokens()
    with torch.no_grad():
        for layer in families.find_moe_layers(model):
            for tensor in layer.tensors().values():
                tensor[3], tensor[6] = tensor[1], tensor[0]
    before, text = outputs(model, ids), written(model)
    put(model, LABELS, FIRST)
    layers = families.find_moe_layers(model)
    assert {(layer.num_stored, layer.num_experts) for layer in layers} == {(8, EXPERTS)}
    assert (outputs(model, ids) - before).abs().max() <= 2e-5 * before.abs().max()
    assert text is None or torch.equal(written(model), text)
    for layer in layers:
        replace.restore_experts(layer)
    assert torch.equal(outputs(model, ids), before)


class Trace:
    """What reaches every experts module: tokens, and which experts they are sent to."""

    def __init__(self, model, ids):
        self.tokens, self.chosen, handles = {}, {}, []
        for layer in families.find_moe_layers(model):
            kind = type(layer.experts).__name__
            name = layer.name
            if kind == "JetMoeMoE":
                handles.append(
                    layer.experts.router.register_forward_hook(
                        lambda _, i, o, n=name: self.take(n, i[0], o[0])
                    )
                )
            elif kind == "Llama4TextExperts":
                handles.append(
                    layer.router.register_forward_hook(
                        lambda _, i, o, n=name: self.take(n, i[0], o[0].nonzero()[:, 1])
                    )
                )
            else:
                handles.append(
                    layer.experts.register_forward_pre_hook(
                        lambda _, i, k, n=name: self.take(n, *[*i, *k.values()][:3]), with_kwargs=True
                    )
                )
        outputs(model, ids)
        for handle in handles:
            handle.remove()

    def take(self, name, tokens, index, weight=None):
        self.tokens[name] = tokens.reshape(-1, tokens.shape[-1]).detach()
        self.chosen[name] = index if weight is None else index[weight != 0]


@torch.no_grad()
def alone(experts, expert, tokens):
    """Output of one expert for every token, by the family's own forward in float64."""
    kind = type(experts).__name__
    if kind == "Llama4TextExperts":
        return experts(tokens.repeat(len(experts.down_proj), 1)).view(-1, *tokens.shape)[expert]
    if kind == "JetMoeMoE":
        gate, up = torch.nn.functional.linear(tokens, experts.input_linear.weight[expert]).chunk(2, -1)
        return torch.nn.functional.linear(experts.activation(gate) * up, experts.output_linear.weight[expert])
    # Twice, once with weight zero: LongCat's forward trips over a single choice.
    index, weight = (
        torch.full((len(tokens), 2), expert),
        torch.eye(2, dtype=tokens.dtype)[:1].repeat(len(tokens), 1),
    )
    if kind == "DbrxExperts":
        return experts(tokens[None], index, weight)[0]
    return experts(tokens, index, weight)


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED)
def test_mean_outputs_are_those_of_a_dense_pass(family):
    model, ids = built(family), tiny_tokens()
    wide = {layer.name: copy.deepcopy(layer.experts).double() for layer in families.find_moe_layers(model)}
    for implementation in IMPLEMENTATIONS if switchable(model) else ("eager",):
        if implementation != "eager":
            model.set_experts_implementation(implementation)
        trace = Trace(model, ids)
        stats = capture(model, ids, needs=("usage", "outputs"), progress=False, batch_size=len(ids))
        assert list(stats.layers) == list(trace.tokens)
        for layer in families.find_moe_layers(model):
            sums, tokens = stats.layers[layer.name], trace.tokens[layer.name].double()
            dense = torch.stack(
                [alone(wide[layer.name], expert, tokens).mean(0) for expert in range(EXPERTS)]
            )
            assert (sums.mean_output - dense).abs().max() <= 1e-5 * dense.abs().max()
            assert layer.router is not None
            assert int(sums.tokens.sum()) == ids.numel() == len(tokens)
            if type(layer.experts).__name__ != "JetMoeMoE":
                chosen = trace.chosen[layer.name].flatten()
                count = torch.bincount(chosen[chosen < EXPERTS], minlength=EXPERTS)
                assert sums.usage_count.sum(0).tolist() == count.tolist()
            assert torch.isfinite(sums.logit_gram).all()


def test_layers_that_predict_further_tokens_are_not_promised(tmp_path):
    model = tiny_model("deepseek_v3")
    assert model.config.num_mtp_layers == 1
    plan = make_plan(capture(model, tiny_tokens(), progress=False), model, experts=KEPT)
    save_merged(model, plan, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_checkpoint_that_computes_something_else_is_told(monkeypatch):
    right = families.load_merged

    def wrong(folder):
        model = right(folder)
        with torch.no_grad():
            families.find_moe_layers(model)[0].experts.down_proj[0, 0, 0] += 1
        return model

    monkeypatch.setattr(families, "load_merged", wrong)
    assert families.probe("mixtral")["mapped"] == "what is loaded computes something else than what was saved"


@pytest.mark.parametrize("family", ["llama4", "muse_spark"])
def test_experts_that_nothing_can_be_solved_for_say_so(family):
    model, ids = tiny_model(family), tiny_tokens()
    stats = capture(
        model, ids, needs=("usage", "outputs", "norms", "grams", "sample"), sample=64, progress=False
    )
    plan = make_plan(stats, model, experts=KEPT, method="hc-least-squares")
    with pytest.raises(ValueError, match='so that combine "least-squares" has nothing to solve'):
        families.apply_plan(model, plan, stats)


@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "longcat_flash", "gpt_oss", "nemotron_h"])
def test_odd_layouts_are_read_and_written_neuron_by_neuron(family):
    model = built(family, torch.float64)
    layer = families.find_moe_layers(model)[0]
    tokens = torch.randn(
        5, layer.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    wanted = [alone(layer.experts, expert, tokens) for expert in range(EXPERTS)]
    order = torch.randperm(layer.width, generator=torch.Generator().manual_seed(1))
    shuffled = [layer.neurons(expert).take(order) for expert in range(EXPERTS)]
    for neurons, output in zip(shuffled, wanted, strict=True):
        offset = 0 if neurons.offset is None else neurons.offset
        torch.testing.assert_close(layer.activate(neurons, tokens) @ neurons.down.T + offset, output)
    replace.replace_experts(layer, layer.stacked(shuffled), list(range(EXPERTS)))
    for expert, output in enumerate(wanted):
        torch.testing.assert_close(alone(layer.experts, expert, tokens), output)
    narrow = [neurons.take(order[:7]) for neurons in shuffled]
    replace.restore_experts(layer)
    made = layer.stacked(narrow)
    assert {name: list(tensor.shape) for name, tensor in made.items()} == layer.shapes(EXPERTS, 7)


@pytest.mark.parametrize("method", ["trimming", "mc-smoe", "hc-least-squares"])
@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "longcat_flash", "gpt_oss", "nemotron_h"])
def test_odd_layouts_are_combined_and_saved(family, method, tmp_path):
    model, ids = tiny_model(family), tiny_tokens(16)
    stats = capture(model, ids, methods=(method,), progress=False)
    plan = make_plan(stats, model, experts=EXPERTS // 2, method=method)
    save_merged(model, plan, tmp_path / "merged", stats=stats, router="mapped")
    families.apply_plan(model, plan, stats)
    loaded = families.aligned(families.load_merged(tmp_path / "merged"))
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))


@pytest.mark.parametrize("family", ["deepseek_v3", "phimoe", "longcat_flash"])
def test_a_router_that_takes_two_experts_is_not_left_with_one(family, tmp_path):
    model, ids = tiny_model(family), tiny_tokens()
    stats = capture(model, ids, progress=False)
    plan = make_plan(stats, model, experts=1, router="row-kept")
    with pytest.raises(ValueError, match="router's rule takes 2 experts at least, and 1 would be left"):
        save_merged(model, plan, tmp_path / "m", stats=stats)
    assert not list(tmp_path.iterdir())
    mapped = make_plan(stats, model, experts=1)
    save_merged(model, mapped, tmp_path / "m")
    live = outputs(families.apply_plan(model, mapped), ids)
    assert torch.equal(outputs(families.aligned(families.load_merged(tmp_path / "m")), ids), live)


def test_families_are_tried_out_by_their_tool(tmp_path, capsys):
    families.main(["mixtral", "doge", "--out", str(tmp_path / "table.json")])
    content = json.loads((tmp_path / "table.json").read_text())
    listed = {row["family"]: row for row in ROWS}
    assert content["transformers"] == transformers.__version__
    assert [row["family"] for row in content["families"]] == ["doge", "mixtral"]
    if transformers.__version__ == VERSION:
        assert content["families"] == [listed["doge"], listed["mixtral"]]
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[:-1] == family_table.table(content["families"]).splitlines()
    assert printed[-1] == str(tmp_path / "table.json")


def test_the_tool_names_the_families_where_one_is_misspelt(capsys):
    with pytest.raises(SystemExit):
        families.main(["mixtrall"])
    assert "mixtrall is none of the families: afmoe, " in capsys.readouterr().err
