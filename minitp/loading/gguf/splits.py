"""The rules by which byte-level BPE splits a text into words before merging, by tokenizer.ggml.pre.

They are those of the models' tokenizer.json; llama.cpp's src/llama-vocab.cpp has the names. Names with the
same rule there share one here.
"""

from dataclasses import dataclass

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT = r"\p{N}"
# The letters that have an upper or a lower case, as DeepSeek LLM lists them.
CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅ"
    "Ὀ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯ"
    "ꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",  # Chinese, Japanese and Korean
    DIGIT,
)


@dataclass(frozen=True)
class Splits:
    """The rule of one kind of tokenizer.

    Attributes
    ----------
    patterns : tuple of str
        Regular expressions; each splits the pieces that the one before it has left.
    gpt_2 : bool
        Whether GPT-2's own pattern, which is built into the library, splits last.
    whole_words_first : bool
        Whether a word in the vocabulary is one token, even if no merges produce it.
    bos : bool
        Whether BOS comes first unless tokenizer.ggml.add_bos_token says otherwise.
    """

    patterns: tuple = ()
    gpt_2: bool = False
    whole_words_first: bool = False
    bos: bool = False


_LLAMA_3 = Splits((LLAMA_3,), whole_words_first=True, bos=True)
_DIGITS_FIRST = Splits((DIGIT,), gpt_2=True)

SPLITS = {
    "gpt-2": Splits(gpt_2=True),
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,  # Granite Code, too
    "command-r": _DIGITS_FIRST,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "smaug-bpe": Splits((LLAMA_3,)),
    "qwen2": Splits((LLAMA_3.replace("{1,3}", ""),)),
    "tekken": Splits((TEKKEN,), whole_words_first=True, bos=True),
    "deepseek-llm": Splits(DEEPSEEK_LLM),
}
