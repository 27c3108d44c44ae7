"""Rewards are imported by name, and only with what they need."""

import json
import subprocess
import sys

import pytest

from trl_unigrpo import rewards


OPTIONAL = ("onnxruntime", "openai", "pydantic", "rapidfuzz", "rapidocr", "scipy", "torchvision", "fastapi", "uvicorn")


@pytest.mark.parametrize("name", rewards.__all__)
def test_public_names_resolve(name):
    found = getattr(rewards, name)
    assert getattr(found, "__name__", name) == name
    assert name in dir(rewards)


def test_importing_rewards_loads_nothing():
    heavy = ("torch", "transformers", "trl", "numpy", "PIL", *OPTIONAL)
    code = f"import trl_unigrpo.rewards, json, sys; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == []


def test_missing_extra_is_named():
    code = (
        "import sys; sys.modules['rapidocr'] = None\n"
        "from trl_unigrpo.rewards import OCRReward\n"
        "try: OCRReward()\n"
        "except ImportError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "OCRReward reads with rapidocr: pip install 'trl-unigrpo[ocr]'."


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'OCRRewards'"):
        _ = rewards.OCRRewards
