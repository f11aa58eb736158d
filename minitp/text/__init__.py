"""Conversion of text to token ids and back.

tokenizer.py              a tokenizer.json, and text that arrives token by token
tokenizer_config.py       the settings of a tokenizer that are outside tokenizer.json
chat_template.py          a conversation, rendered by the model's template
template_environment.py   the Jinja environment of chat templates
stop_strings.py           the strings that end a text
"""
