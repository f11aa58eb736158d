"""Paths of the folders and scripts that the tests use."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT, SUPPORT = TESTS.parent, TESTS / "support"
GOLDENS, STAND_IN = TESTS / "goldens", TESTS / "cuda_stand_in"
PROBED = SUPPORT / "probed"  # recordings of transformers, made by make_probe_dumps.py
ENGINE_RECORDINGS = SUPPORT / "engine_recordings"  # of other engines, made by make_engine_dumps.py
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
FAULTY_WORKER = [sys.executable, str(SUPPORT / "faulty_worker.py")]
GPU_BENCHMARK = [sys.executable, str(SUPPORT / "gpu_benchmark.py")]
