"""Shapes and tokenizer of the embedded models."""

import random

from hcsmoe_core._util import EMBEDDED, check_choice
from hcsmoe_core.demo import corpus

VOCABULARY = 1024
END_OF_TEXT = "<|endoftext|>"


def configuration(name: str, experts: int = 0):
    """Configuration of an embedded model, with another number of experts while it is being grown.

    ``demo-mixtral`` has 8 experts of width 256, top-2. ``demo-qwen`` has 32 of width 64, top-4, and a shared
    expert of width 128 that every token goes through.
    """
    from transformers import MixtralConfig, Qwen2MoeConfig

    check_choice("name", name, EMBEDDED)
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
        intermediate_size=256,
    )
    if name == "demo-mixtral":
        experts = dict(num_local_experts=experts or 8, num_experts_per_tok=2)
        return MixtralConfig(sliding_window=None, **experts, **common)
    experts = experts or 32
    return Qwen2MoeConfig(
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=experts,
        num_experts_per_tok=min(4, experts),
        norm_topk_prob=True,
        decoder_sparse_step=1,
        **common,
    )


def train_tokenizer(seed: int = 0):
    """Byte-level BPE of 1,024 tokens over the training split; every digit is a token of its own.

    A text is encoded with one ``<|endoftext|>`` before it, as the models were trained.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (corpus.text_of(domain, rng, "train", 5000) for _ in range(100) for domain in corpus.DOMAINS),
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
