"""The judgement of recordings in 16 bits, made by tests/support/make_16_bit_recordings.py."""

import json

import pytest
from paths import GOLDENS, SUPPORT

from minitp.judge.files import RecordedFiles
from minitp.judge.recording import EngineRecording
from minitp.judge.run import judge
from minitp.loading.source import open_model
from minitp.trace.reference import open_oracle

FOLDER = SUPPORT / "recordings_16_bit"
RIGHT = {
    "gemma2-bfloat16": "bfloat16",
    "qwen3-float16": "float16",
    "granite-bfloat16": "bfloat16",
    "llama2-autocast": "bfloat16",
}
FAULTY = json.loads((SUPPORT / "faulty_recordings.json").read_text())
WRONG = sorted(path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in RIGHT)


def judged(name, golden):
    source = open_model(str(GOLDENS / golden), 1)
    recording = EngineRecording(RecordedFiles(FOLDER / f"{name}.safetensors"), source)
    return recording, judge(recording, open_oracle(source))


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_blamed_in_a_right_recording(name):
    recording, judgement = judged(name, name.partition("-")[0])
    assert judgement.result.blamed() == []
    assert max(finding.ratio for finding in judgement.result.findings) < 0.9
    assert recording.matmul_dtype.name == RIGHT[name]


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_named_in_bfloat16(name):
    case = FAULTY[name.removesuffix("-bfloat16").replace("-", " ")]
    _, judgement = judged(name, case["model"])
    assert judgement.result.blamed()[0].name.partition("/")[2] == case["step"]
    assert case["words"] in judgement.explanation
