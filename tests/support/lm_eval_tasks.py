"""Helpers for a run of lm-evaluation-harness: its tasks, and log-likelihoods of a model for comparison."""

import json
import os
import subprocess

import numpy as np

LIMIT_S = 120
# The model ends its text after this answer. The end-of-text token must not count as part of the answer.
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
CHAT += "<|im_start|>assistant\nThe capital of France is"
CHOICES = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "Berlin"], "answer": 0},
    {"question": "The chemical symbol of gold is", "choices": ["Ag", "Fe", "Au"], "answer": 2},
    {"question": "The longest river of Africa is the", "choices": ["Congo", "Nile River"], "answer": 1},
    {"question": CHAT, "choices": ["Rome.", "Paris."], "answer": 1},
    {"question": "Seven times eight is", "choices": ["fifty-six", "sixty-three"], "answer": 0},
]
CONTINUATIONS = [
    {"question": "The capital of France is", "answer": "Paris"},
    {"question": "The first three letters of the alphabet are", "answer": "A, B and C"},
]
TEXTS = [{"text": "Once upon a time, there was a little girl who lived in a small house."}]
TASKS = {
    "choices": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "continuations": (
        CONTINUATIONS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": " {{answer}}",
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "texts": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ),
}


def write_tasks(folder):
    """Write the tasks and their data into a folder for --include_path."""
    for name, (rows, fields) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        config = {"task": name, "test_split": "test", **source, **fields}
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML


def run_lm_eval(command, folder):
    """Run an lm_eval command on the tasks of a folder, and return {task: metrics} and {task: responses}."""
    command = [*command, "--include_path", folder, "--output_path", folder / "out", "--log_samples"]
    offline = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | offline | {"HF_DATASETS_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout
    (results,) = (folder / "out").rglob("results_*.json")
    metrics, responses = json.loads(results.read_text())["results"], {}
    for task in metrics:
        (path,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        responses[task] = [[response for (response,) in row["resps"]] for row in rows]
    return metrics, responses


def log_likelihood(alone, context, ids):
    """Return the log-likelihood of token ids after a context, and whether each is the most probable token.

    Parameters
    ----------
    alone : served.Reference
    context, ids : list of int
    """
    both, start = [*context, *ids], len(context)
    cache = alone.model.new_cache(len(both))
    logits = alone.model.forward(both, cache, logits_at=slice(start - 1, -1)).astype(float)  # [len(ids), V]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # [len(ids), V]
    return logprobs[range(len(ids)), ids].sum(), logprobs.argmax(-1).tolist() == ids
