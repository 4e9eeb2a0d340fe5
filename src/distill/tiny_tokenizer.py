"""The tokenizer of razor-tiny: byte-level BPE, Qwen2 pre-tokenizer pattern, a chat template with thinking.

Not a command. `bash pipelines/make_tiny.sh` builds it from generated text (seeded, so the same file every time).
"""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gguf_convert import QWEN2_PATTERN
from task_text import TASK_TEXTS, default_world

VOCAB_SIZE = 832
END_OF_TEXT, IM_START, IM_END, THINK, END_THINK = SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
)  # fmt: skip
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}"""


def sample_texts(count: int, seed: int = 0) -> list[str]:
    """Training-split texts of every task and statements of the world, for the BPE trainer."""
    rng, world = random.Random(f"tokenizer:{seed}"), default_world()
    texts = [world.statement(person, rng) for person in rng.sample(world.people, count)]
    for task in TASK_TEXTS:
        instance = task()
        for _ in range(count):
            item, solution = instance.generate(rng, "train")
            texts += [item.question, solution]
    return texts


def build_tokenizer(samples: int = 6000) -> PreTrainedTokenizerFast:
    """Train the BPE (seconds on one core) and wrap it with special tokens and the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(samples), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=IM_END, pad_token=END_OF_TEXT, model_max_length=2048)
    fast.add_special_tokens({"additional_special_tokens": [END_OF_TEXT, IM_START, IM_END]})
    fast.add_tokens([THINK, END_THINK])
    fast.chat_template = CHAT_TEMPLATE
    return fast
