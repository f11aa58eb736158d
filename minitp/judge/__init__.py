"""`minitp judge`: repeat the recorded operations of another engine, and name the first wrong one.

run.py          the judgement: each recorded step against the operation on its recorded inputs; start here
recording.py    the recording, as the replay of `check` reads it
ties.py         experts with equal router logits, of which the engine may choose any
hypotheses.py   the mistakes, tried one by one on the first wrong step
attention_mistakes.py, other_mistakes.py: what each operation may compute instead; wrong_step.py: its inputs
"""
