"""The two embedded models: their shapes, their tokenizer and where they lie."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


WEIGHTS = FOLDER / "weights"


NAMES = ("demo-mixtral", "demo-qwen")


VOCABULARY = 1024


END_OF_TEXT = "<|endoftext|>"


def folder(name):
    """Model folder of an embedded model.

    Raises
    ------
    ValueError
        If there is no embedded model of that name.
    """
    if name not in NAMES:
        raise ValueError(f"There is no embedded model {name!r}; they are {', '.join(NAMES)}.")
    return WEIGHTS / name


def families(name):
    """True families of a model's experts, or None if they are not known.

    ``demo-qwen`` was grown by splitting experts, so that the ancestors that two experts share are known: a ground truth
    for clustering that other models do not have. A tree is built into that model, which favours hierarchical clustering.

    Returns
    -------
    dict of int to list of int
        By the number of ancestors that are told apart, the family of each expert, the same in every layer.
    """
    path = WEIGHTS / str(name) / "families.json"
    if name not in NAMES or not path.exists():
        return None
    return {int(k): v for k, v in json.loads(path.read_text(encoding="utf-8"))["families"].items()}


def configuration(name, experts=None):
    """Configuration of an embedded model, with another number of experts while it is being grown.

    ``demo-mixtral`` has 8 experts of width 256 of which a token takes 2. ``demo-qwen`` has 32 of width 64, takes 4, and
    a shared expert of width 128 that every token goes through.
    """
    from transformers import MixtralConfig, Qwen2MoeConfig

    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    if name == "demo-mixtral":
        return MixtralConfig(
            intermediate_size=256,
            num_local_experts=experts or 8,
            num_experts_per_tok=2,
            sliding_window=None,
            **common,
        )
    if name == "demo-qwen":
        experts = experts or 32
        return Qwen2MoeConfig(
            intermediate_size=256,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            num_experts=experts,
            num_experts_per_tok=min(4, experts),
            norm_topk_prob=True,
            decoder_sparse_step=1,
            **common,
        )
    raise ValueError(f"There is no embedded model {name!r}; they are {', '.join(NAMES)}.")


def train_tokenizer(seed=0):
    """Byte-level BPE of 1,024 tokens over the training split; every digit is a token of its own.

    A text is encoded with one ``<|endoftext|>`` before it, as the models were trained.
    """
    import random

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from hcsmoe_core.demo import corpus

    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (corpus.text_of(d, rng, "train", 5000) for _ in range(100) for d in corpus.DOMAINS),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
