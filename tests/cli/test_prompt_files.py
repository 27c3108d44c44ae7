"""Prompts from files."""

from trl_unigrpo.cli.prompt_files import load_prompts


def test_blank_lines_of_a_text_file_are_no_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\n\n  \na small tree\n\n")
    assert list(load_prompts(str(file), "train")["prompt"]) == ["a red cat", "a small tree"]
