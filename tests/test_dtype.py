"""What `--dtype auto` chooses: nothing that rounds what the checkpoint does not, nothing that the machine imitates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import save_checkpoint
from whyrank.errors import InputError
from whyrank.generators.hf import load
from whyrank.generators.hf.load import DTYPES, Dtype, load_model, resolve_dtype

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The same checkpoint in three formats; a Gemma, whose language model may be a part of the config."""
    whole = save_checkpoint("gemma3", tmp_path_factory.mktemp("float32"))
    found = {torch.float32: whole}
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path_factory.mktemp(str(dtype).removeprefix("torch."))
        load_model(whole, CPU, dtype).save_pretrained(folder)
        found[dtype] = folder
    return found


@pytest.mark.parametrize("is_native", [True, False])
def test_a_cpu_multiplies_bfloat16_only_if_both_have_it(
    stored: dict[torch.dtype, Path], monkeypatch: pytest.MonkeyPatch, is_native: bool
) -> None:
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda: is_native)
    chosen = {dtype: resolve_dtype("auto", CPU, folder) for dtype, folder in stored.items()}
    assert chosen == {
        torch.float32: torch.float32,
        torch.float16: torch.float32,
        torch.bfloat16: torch.bfloat16 if is_native else torch.float32,
    }


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_is_asked_for_is_taken(stored: dict[torch.dtype, Path], dtype: Dtype) -> None:
    assert {resolve_dtype(dtype, CPU, folder) for folder in stored.values()} == {DTYPES[dtype]}


def test_auto_has_to_find_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda: True)
    with pytest.raises(InputError, match="expected a folder with a Hugging Face checkpoint"):
        resolve_dtype("auto", CPU, tmp_path)


def test_8_bits_are_for_cpus(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs on CPUs, not on cuda"):
        resolve_dtype("int8", torch.device("cuda"), tmp_path)
