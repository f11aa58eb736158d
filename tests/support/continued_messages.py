"""Templates of the common forms, and prompts of Hugging Face transformers that continue a message.

The expected prompts in continued_messages.json are made by running this file with transformers:

    pip install transformers==5.23.0 jinja2==3.1.6      (the file records the versions)
    python tests/support/continued_messages.py

They are, for each template and each text of the final message: the prompt that ends with this text, or null
if the template omits or changes the text.
"""

import json
from pathlib import Path

EXPECTED = Path(__file__).with_name("continued_messages.json")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "ChatML": """{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "Llama 2": """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
[INST] {{ m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "Llama 3": """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>{% endif %}""",
    "Mistral": """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
[INST] {{ m.content }}[/INST]
{%- else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}""",
    "Gemma": """{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
<start_of_turn>{{ role + '\n' + m.content.strip() }}<end_of_turn>
{% endfor %}""",
    "without reasoning": """{% for m in messages %}
<{{ m.role }}>{{ m.content.split('</think>')[-1].lstrip() }}
{% endfor %}""",
    "without the last message": "{% for m in messages[:-1] %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "in upper case": "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
}
TEXTS = ["Sure,", "Sure, ", "  Yes\n\n", "", "<think>\nhm", "<think>\nhm\n</think>\n\nYes, "]


def conversation(text):
    """Return messages of which the final one has this text."""
    return [{"role": "user", "content": " Hi? "}, {"role": "assistant", "content": text}]


def prompt(template, text):
    """Return the prompt that transformers makes, or None if it refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        return render_jinja_template(
            [conversation(text)], chat_template=template, continue_final_message=True, **TOKENS
        )[0][0]
    except ValueError:
        return None


def main():
    import jinja2
    import transformers

    values = {"versions": {module.__name__: module.__version__ for module in (transformers, jinja2)}}
    for name, template in TEMPLATES.items():
        values[name] = [prompt(template, text) for text in TEXTS]
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
