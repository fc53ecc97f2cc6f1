"""What is there already is written over when that is asked for, and not otherwise."""

import pytest
from toy_command import run

ENDS = {"score": "scores.csv", "unlearn": "unlearned.safetensors"}


@pytest.mark.parametrize("command", ENDS)
@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_is_there_stays_unless_forced(toy, monkeypatch, command, named):
    folder, options, _ = toy
    out = folder / ENDS[command]
    options += ["--out", out] if named else []
    monkeypatch.chdir(folder)
    out.write_text("mine")
    # Refused before anything is read: the weights are not there either.
    text = run(command, *options, "--weights", folder / "none.pt", code=2)
    assert text.startswith("error: out=") and "is there already" in text and "--force" in text
    assert out.read_text() == "mine"
    run(command, *options, "--force")
    assert out.read_bytes() != b"mine"
    written = out.read_bytes()
    run(command, *options, code=2)
    assert out.read_bytes() == written


def test_force_writes_over_no_input(toy):
    folder, options, _ = toy
    data = folder / "forget.npz"
    before = data.read_bytes()
    assert "is data=" in run("score", *options, "--out", data, "--force", code=2)
    assert data.read_bytes() == before


def test_lines_are_not_written_over_and_a_folder_never(tmp_path):
    pytest.importorskip("transformers")
    import text_models as tm

    tm.folder(tmp_path / "gpt2", "gpt2")
    options = ["--model", tmp_path / "gpt2", "--data", tm.pairs(tmp_path / "qa.jsonl")]
    out = tmp_path / "scores.jsonl"
    out.write_text("mine")
    assert "--force" in run("score", *options, "--out", out, code=2)
    assert out.read_text() == "mine"
    run("score", *options, "--out", out, "--force")
    assert len(out.read_text().splitlines()) == len(tm.PAIRS)
    text = run("unlearn", *options, "--out", tmp_path / "gpt2", "--force", code=2)
    assert "is a folder, which is never replaced" in text
    assert "is there already" in run("unlearn", *options, "--out", tmp_path / "gpt2", code=2)
