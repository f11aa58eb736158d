"""Conversion of text to token ids and back.

tokenizer.py       a tokenizer.json, and text that arrives token by token
chat_template.py   a conversation, rendered by the model's template
stop_strings.py    the strings that end a text
"""
