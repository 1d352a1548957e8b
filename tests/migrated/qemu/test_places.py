"""The record of a guest: written while the guest stands still, and whole whenever the daemon is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.vmm.qemu.places import Place, place_path, read_place, write_place

PLACE = Place(name="web", started_here=True, run_log=Path("/run/web.runlog"))


def test_it_is_rewritten_in_place(tmp_path: Path) -> None:
    """Without a new name, which a busy file system may take its time for."""
    api_socket = tmp_path / "web.sock"
    write_place(api_socket, PLACE)
    before = place_path(api_socket).stat()
    for epoch in (7, 123_456_789, 8):
        changed = PLACE.model_copy(update={"epoch": epoch})
        write_place(api_socket, changed)
        assert read_place(api_socket) == changed
    after = place_path(api_socket).stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


@pytest.mark.parametrize("lengths", [(10, 5000), (5000, 10), (5000, 9000)])
def test_one_that_does_not_fit_is_replaced(tmp_path: Path, lengths: tuple[int, int]) -> None:
    api_socket = tmp_path / "web.sock"
    for length in lengths:
        place = PLACE.model_copy(update={"agent": Path("/", *(["a" * 100] * (length // 100)))})
        write_place(api_socket, place)
        assert read_place(api_socket) == place
    assert [path.name for path in tmp_path.iterdir()] == ["web.place"]
