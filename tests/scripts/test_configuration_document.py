"""docs/configuration.md says what the configuration's models say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from migrated.settings.config import Config, load_config
from migrated.settings.parameters import Bytes, BytesPerSecond, Milliseconds
from scripts.documents import configuration


def test_no_meaning_is_left_over() -> None:
    keys = {f"{section}.{name}" for section, model in configuration.models().items() for name in model.model_fields}
    assert set(configuration.MEANINGS) <= keys


def test_the_documented_defaults_are_a_configuration(tmp_path: Path) -> None:
    lines = []
    for line in configuration.DOCUMENT.read_text(encoding="utf-8").splitlines():
        if head := re.match(r"##+ `(\[\w+\])`", line):
            lines.append(head[1])
        elif (row := re.match(r"\| `(\w+)`(?: `--[\w-]+`)? \| .*? \| `(.+?)` \|", line)) and lines:
            lines.append(f"{row[1]} = {row[2]}")
    file = tmp_path / "defaults.toml"
    file.write_text("\n".join(lines))
    (tmp_path / "empty.toml").write_text("")
    assert len(lines) > len(Config.model_fields)
    assert load_config(file, {}) == load_config(tmp_path / "empty.toml", {})


class Sample(BaseModel):
    """``[sample]``: keys of every kind."""

    wait_ms: Milliseconds = Field(default=1500.0, gt=0, le=2_000_000)
    """How long
    it waits, in ``ms``."""
    cache_bytes: Bytes = Field(default=64 << 20, ge=1 << 20)
    """Memory."""
    cap_bytes_per_s: BytesPerSecond = 0
    """Rate."""


def test_units_ranges_and_texts_come_from_the_model() -> None:
    _, _, about, _, _, _, *rows = configuration.section_table("sample", Sample).splitlines()
    assert about == "Keys of every kind."
    assert rows == [
        '| `wait_ms` | duration above 0 to 2,000,000 ms | `"1500ms"` | How long it waits, in `ms`. |',
        '| `cache_bytes` | size from 1MiB | `"64MiB"` | Memory. |',
        "| `cap_bytes_per_s` | rate | `0` | Rate. |",
    ]


def test_a_key_without_a_meaning_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sample\.nothing must have one meaning"):
        configuration.meaning("sample", "nothing", {})
    with pytest.raises(ValueError, match=r"log\.level must have one meaning"):
        configuration.meaning("log", "level", {"level": "A second one."})
