"""A file of samples that outlives a kill and notices what others did to it."""

from __future__ import annotations

import pytest

from train.sample_file import Progress, SampleFile


def test_a_file_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"

    def write(index):
        file = SampleFile(path, {"key": 1})
        file.append([{"provenance": {"index": index}}], Progress(next=index + 1))

    write(0)
    write(1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"provenance": {"index": 2}}\n{"prov')  # what a killed run leaves
    assert SampleFile(path, {"key": 1}).cut == 35
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"text": "mine"}\n')
    with pytest.raises(ValueError, match="holds rows that this run did not write"):
        SampleFile(path, {"key": 1})
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"has \d+ bytes, a.jsonl.meta.json says \d+"):
        SampleFile(path, {"key": 1})
    path.write_bytes(whole.replace(b"\n", b" ", 1)[:-1] + b"\n")
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        list(SampleFile(path, {"key": 1}).rows())
