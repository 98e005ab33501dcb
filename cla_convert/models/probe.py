"""Text on which tokenizers differ, and what one makes of it. Plain Python: `verify` runs it in its clean process.

Pre-tokenizers differ in how they cut numbers, spaces, capitals, marks and scripts, normalisers in what they fold, and
tokenizers in what they put around a text.
"""

import hashlib
import json
from typing import Any

TEXTS = (
    "In 2024, 19,790 of 21,061 people paid $1,234,567.89 (-3.5e-10, 0x1F4A, 50%, 1st, 3/4) at 12:45:30 on 1999-12-31.",
    "I'M SURE it's THEY'LL don't we've; e.g. HTTPServer2 snake_case camelCase x86_64 https://a.b/c?d=e&f=%20#g 'tis",
    "def f(x: int) -> int:\n\tif x != 0:\n        return x ** 2  # squared\n\n\n    else:\r\n        pass\n \n\t\t\n",
    "  two  spaces   three    four, tab\there,\u00a0no-break\u3000wide \u200b\u200d zero\ufeff and an end   ",
    "\n\n",
    "Ünïcödé cafe\u0301 ﬁne Ångström №4 ½ Ⅷ １２３ ＡＢＣ ß ﷺ",
    "Привет, мир! Καλημέρα שָׁלוֹם مرحبا ١٢٣٤ नमस्ते १२३ สวัสดีครับ",
    "こんにちは世界 カタカナ 안녕하세요 你好，2024年 中文字",
    "👩‍👩‍👧‍👦👍🏽🇩🇪 ∑∫√≠ \\frac{a}{b}",
    "```json\n{\"a\": [1, 2, 3.0], 'b': null}\n``` <b>&amp;</b> [x](y) ***!!!??? ...—–“”",
    "<s> </s> <unk> <pad> <|endoftext|> [INST] <|im_start|>user\n",
    "",
)  # fmt: skip
MESSAGES = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "Yes  2024."}]


def texts_for(tokenizer: Any) -> list[str]:
    """TEXTS, and every special token of the tokenizer (256 at most) alone, inside a word and between spaces."""
    specials = sorted(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()))
    every = specials[:: max(1, len(specials) // 256)]
    return [*TEXTS, *(f"{token}a2024{token} b {token}  {token}\n" for token in every)]


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of each text."""
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def digest_of(tokenizer: Any) -> str:
    """A hash of the ids of all texts, with the tokens that the tokenizer puts around them."""
    return hashlib.sha256(json.dumps(ids_of(tokenizer, texts_for(tokenizer))).encode()).hexdigest()


def chat_of(tokenizer: Any) -> Any:
    """The ids of a conversation under the tokenizer's template; None if it has none, or none for this."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return list(tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False))
    except Exception as error:  # a template may refuse; then it must refuse everywhere
        return type(error).__name__
