"""Text to token ids and back.

tokenizer.py       a tokenizer.json, and text that arrives token by token
chat_template.py   a conversation as the model's template renders it
stop_strings.py    the strings that end a text
"""
