import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads of each would fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(os.environ.get("HCSMOE_GOLDENS", ROOT.parent / "shared" / "reference" / "goldens"))


def pytest_report_header(config):
    return f"goldens: {'found' if GOLDENS.is_dir() else 'NOT FOUND, tests against them are skipped'}"


@pytest.fixture(scope="session")
def goldens():
    if not GOLDENS.is_dir():
        pytest.skip("no goldens: give their folder as HCSMOE_GOLDENS")
    return GOLDENS / "mixtral_tiny"


TINY = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    tie_word_embeddings=False,
)
EXPERTS = 8


def tiny_model(family, dtype=torch.float32, seed=0, implementation="eager"):
    """A small random model of a family, in evaluation mode."""
    import transformers as t

    configurations = {
        "mixtral": lambda: t.MixtralConfig(
            intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=2, **TINY
        ),
        "qwen2_moe": lambda: t.Qwen2MoeConfig(
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts=EXPERTS,
            num_experts_per_tok=4,
            norm_topk_prob=False,
            **TINY,
        ),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            intermediate_size=48,
            moe_intermediate_size=24,
            num_experts=EXPERTS,
            num_experts_per_tok=3,
            head_dim=8,
            **TINY,
        ),
        "olmoe": lambda: t.OlmoeConfig(
            intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=2, **TINY
        ),
        # Beyond the four that are proven: a sigmoid router with a correction bias, groups and a dense first
        # layer, and transposed projections with biases, a clamp and interleaved halves.
        "deepseek_v3": lambda: t.DeepseekV3Config(
            **TINY | {"num_key_value_heads": 4},
            intermediate_size=48,
            moe_intermediate_size=24,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "gpt_oss": lambda: t.GptOssConfig(
            **TINY,
            intermediate_size=24,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            head_dim=8,
            sliding_window=16,
        ),
    }
    torch.manual_seed(seed)
    config = configurations[family]()
    model = t.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation=implementation
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:
                parameter.normal_(0, 0.1)
    for parameter in model.parameters():  # buffers keep their dtype, as in a model that was loaded
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


MATCHING = [  # ways of combining that match neurons, as a plan says them
    {"rule": "average", "align": "weights"},
    {"rule": "average", "align": "activations"},
    *(
        {"rule": r, "features": f}
        for r in ("fix-dom", "zipit")
        for f in ("activations", "weights", "activations+weights")
    ),
]

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
OTHERS = ("deepseek_v3", "gpt_oss")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def tokens(sequences=6, length=20, vocabulary=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (sequences, length), generator=generator)


@pytest.fixture
def input_ids():
    return tokens()


@pytest.fixture
def mixtral():
    return tiny_model("mixtral")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
