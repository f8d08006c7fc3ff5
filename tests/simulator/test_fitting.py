"""Seconds by tier are found again in load times drawn from known ones, in every form the files come in."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from simulator.costs import PRODUCTION
from simulator.fitting import fit_modes, main, read_load_times

HEAD = "timestamp_anon,value,container_ip\n"


def drawn() -> list[float]:
    rng = random.Random(0)
    modes = [(2.9, 0.3, 300), (21.9, 0.15, 200), (38.0, 0.1, 400)]
    return [median_s * rng.lognormvariate(0, spread) for median_s, spread, count in modes for _ in range(count)]


def test_the_modes_of_mixed_loads_are_found() -> None:
    modes = fit_modes(drawn())
    assert [mode.median_s for mode in modes] == pytest.approx([2.9, 21.9, 38.0], rel=0.05)
    assert [mode.share for mode in modes] == pytest.approx([3 / 9, 2 / 9, 4 / 9], abs=0.03)
    assert modes[0].spread == pytest.approx(0.3, rel=0.2)
    for times_s in ([], [1.0, 0.0, -1.0], [2.0] * 10):
        with pytest.raises(ValueError, match="too few, or too equal"):
            fit_modes(times_s)


def test_files_are_read_as_they_are_published_and_unpacked(tmp_path: Path) -> None:
    text = (HEAD + "1.0,2900.0,x\n2.0,38000.0,y\n").encode()
    plain, zipped, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz", tmp_path / "a.tar.gz"
    plain.write_bytes(text)
    zipped.write_bytes(gzip.compress(text))
    with tarfile.open(packed, "w:gz") as archive:
        member = tarfile.TarInfo("a.csv")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    assert [read_load_times(path) for path in (plain, zipped, packed)] == [[2.9, 38.0]] * 3
    plain.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'value'"):
        read_load_times(plain)


def test_the_command_says_the_seconds_of_each_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "loads.csv"
    file.write_text(HEAD + "".join(f"0,{1000 * time_s},x\n" for time_s in drawn()))
    monkeypatch.setattr("sys.argv", ["fitting", str(file)])
    main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["900", "host", "disk", "remote"]


def test_the_baselines_seconds_add_up_to_the_trace() -> None:
    near_s, disk_s = PRODUCTION.bus_s, PRODUCTION.bus_s + PRODUCTION.disk_s
    assert (near_s, disk_s, disk_s + PRODUCTION.network_s) == pytest.approx((2.8, 22.4, 38.6), rel=0.05)
