"""Text to token ids and back.

tokenizer.py       tokenizer.json, and text as it comes token by token
chat_template.py   a conversation as the model's template writes it
stop_strings.py    where a text ends
"""
